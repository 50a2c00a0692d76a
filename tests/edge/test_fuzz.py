"""Damaged messages, replies and configs: each ends in a coded error or in the right result."""

import pytest

from simulations.fuzzing.campaign import LAYERS, campaign


@pytest.mark.slow
def test_20000_cases() -> None:
    """`python -m simulations.fuzzing --case N` runs one of them again."""
    found = campaign(0, 20_000)
    assert sum(found.cases.values()) == 20_000
    assert found.cases.keys() == LAYERS.keys()
    assert found.crashes == 0
    assert found.foreign == []
    assert found.hangs == []
    assert found.honest_changed == 0
    assert found.rss_growth_mib < 32
    assert found.threads_max <= 64
    # The grammar is not so wild that nothing legal is left, nor so tame that nothing is refused.
    for layer, ends in found.ends.items():
        assert ends["ok"] > 0.05 * ends.total(), layer
        assert ends["ok"] < 0.95 * ends.total(), layer
