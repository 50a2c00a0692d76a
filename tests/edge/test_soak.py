"""The soak's own judgment: what counts as growth, and as another run's numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from fedsplit.errors import ConfigError
from simulations.soak.picture import picture_of
from simulations.soak.roles import gone_in
from simulations.soak.samples import Rounds, Samples
from simulations.soak.trend import trend_of

SECONDS = np.arange(0.0, 1800.0, 3.0)
ROUND = {"round": 1, "loss": 2.5, "eval_loss": None, "tokens": 9, "clients": 2, "failed": 0}


def noise(kind: str) -> np.ndarray:
    white = np.random.default_rng(0).normal(size=len(SECONDS))
    if kind == "none":
        return np.full(len(SECONDS), 0.1)
    # Memory stays for a while where it is.
    return white if kind == "white" else np.convolve(white, np.ones(30) / 30, mode="same")


@pytest.mark.parametrize("kind", ["none", "white", "slow"])
def test_a_leak_of_one_mib_a_sample_is_found_and_noise_is_no_leak(kind: str) -> None:
    quiet, leaking = 400.0 + noise(kind), 400.0 + noise(kind) + np.arange(len(SECONDS))
    assert trend_of(SECONDS, quiet, of=11).is_zero
    trend = trend_of(SECONDS, leaking, of=11)
    assert not trend.is_zero
    assert trend.slope == pytest.approx(1200.0, rel=0.05), "MiB an hour"


def test_what_grew_at_the_beginning_only_has_no_slope() -> None:
    warming = 400.0 - 200.0 * np.exp(-SECONDS / 30.0) + noise("white")
    assert trend_of(SECONDS, warming, of=11).is_zero


def test_too_few_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="a trend needs values in 4 of 20; run for a longer time"):
        trend_of([0.0, 1.0, 2.0], [1.0, 1.0, 1.0])


def test_a_quantity_with_too_few_values_has_no_trend_and_is_named() -> None:
    samples = Samples({})
    samples.series = {"rss_server": (list(SECONDS), [1.0] * len(SECONDS)), "step_round": ([], [])}
    samples.add("step_session", 1.0, 2.0)
    assert list(samples.trends()) == ["rss_server"]
    assert samples.too_few == ["step_round", "step_session"]


def test_rounds_with_other_numbers_are_named(tmp_path: Path) -> None:
    told = [ROUND | {"version": 3, "steps": 6}, ROUND | {"round": 2, "version": 6, "steps": 6}]
    for name, loss in {"ours": 2.25, "theirs": 2.5}.items():
        (tmp_path / name / "run").mkdir(parents=True)
        lines = [json.dumps(told[0]), json.dumps(told[1] | {"loss": loss}), '{"round": 3']
        (tmp_path / name / "run" / "metrics.jsonl").write_text("\n".join(lines))
    ours, theirs = Rounds(tmp_path / "ours"), Rounds(tmp_path / "theirs")
    assert [each["round"] for each in ours.take()] == [1, 2], "and not the line without an end"
    assert ours.take() == []
    theirs.take()
    assert ours.differences(theirs) == ["round 2: loss is 2.25 in place of 2.5"]


def test_clients_are_gone_in_some_rounds_and_never_all() -> None:
    gone = [gone_in(number, 220229421, 3) for number in range(5000)]
    assert {len(each) for each in gone} == {0, 1, 2}
    assert gone == [gone_in(number, 220229421, 3) for number in range(5000)]


def test_the_picture_has_a_panel_for_each_kind() -> None:
    names = "rss_server", "descriptors_server", "threads_server", "step_round"
    series = {name: (list(SECONDS), list(noise("white"))) for name in names}
    trends = {name: trend_of(*each) for name, each in series.items()}
    assert picture_of(series, trends).startswith(b"\x89PNG")
