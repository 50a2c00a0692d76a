"""fedsplit/README.md lists every file and the figures of the code as they are now."""

import pytest

from simulations.figures import MAP, up_to_date
from simulations.hops import Function, forward_hops


@pytest.fixture(scope="module")
def hops() -> list[Function]:
    return forward_hops()


def test_the_map_is_up_to_date():
    text = MAP.read_text(encoding="utf-8")
    assert text == up_to_date(text), "run: python -m simulations.figures --write"


def test_the_hops_are_the_same_every_time(hops):
    assert sorted(forward_hops()) == sorted(hops)


def test_a_forward_has_few_hops(hops):
    assert len(hops) <= 48, "shorten the path: python -m simulations.figures --hops lists it"


@pytest.mark.parametrize(
    "name",
    ["RemoteTrunk.__call__", "LocalLink.exchange", "TrunkService.handle", "TrunkPart.forward"],
)
def test_the_hops_lead_from_the_client_to_the_trunk(hops, name):
    assert name in {hop.name for hop in hops}
