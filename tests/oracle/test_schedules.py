"""Random schedules of faults, in virtual time, through the real service, engine and sessions."""

from collections import Counter

import pytest

from simulations.schedules.campaign import Campaign, Findings, campaign
from simulations.schedules.planted import PLANTED
from simulations.schedules.schedule import LINK_FAULTS, MESSAGES, Fault, Schedule, schedule_of
from tests.oracle.kept import KEPT

_PLAYED = range(500)


@pytest.fixture(scope="module")
def played():
    with campaign() as made:
        yield made


@pytest.fixture(scope="module")
def findings(played: Campaign) -> Findings:
    return played.run(_PLAYED)


@pytest.mark.slow
def test_no_schedule_violates_an_invariant(played, findings):
    assert findings.schedules == len(_PLAYED)
    for schedule, violations in findings.violations:
        # Printed in the form in which `kept.py` has them.
        print(played.shrunk(schedule), *violations, sep="\n")
    assert not findings.violations


def test_each_fault_happens_to_each_kind_of_message(findings):
    pairs = [(fault, kind) for fault in LINK_FAULTS for kind in MESSAGES]
    assert [pair for pair in pairs if not findings.happened[pair]] == []
    for what in ("crash trunk", "crash trunk after", "checkpoint", "crash", "gone", "freeze"):
        assert findings.happened[what, ""] > 5, what


def test_each_fault_is_planned_often_in_10000_schedules():
    planned = Counter(
        (fault.what, fault.kind) for seed in range(10_000) for fault in schedule_of(seed).faults
    )
    pairs = [(fault, kind) for fault in LINK_FAULTS for kind in MESSAGES]
    assert min(planned[pair] for pair in pairs) > 50


@pytest.mark.parametrize("schedule", KEPT.values(), ids=list(KEPT))
def test_a_schedule_that_once_failed(played, schedule):
    assert played.violations(schedule) == []


def test_the_checker_finds_each_planted_bug(played):
    assert len(PLANTED) == 10
    assert set(played.planted_found()) == PLANTED.keys()


@pytest.mark.parametrize("bug", PLANTED.values(), ids=list(PLANTED))
def test_a_planted_bug_is_the_cause(played, bug):
    assert played.violations(bug.schedule) == []


def test_a_schedule_has_the_same_events_each_time(played):
    schedule = next(each for each in map(schedule_of, range(99)) if each.policy == "quorum")
    first, second = (played.play(schedule) for _ in range(2))
    facts = [
        [(each.time, each.side, each.what, each.kind, each.call, each.digest) for each in run.log]
        for run in (first, second)
    ]
    assert facts[0] == facts[1]


def test_shrinking_drops_what_does_not_matter(played):
    cause = Fault(what="lose reply", client="bob", kind="step")
    noise = Fault(what="repeat", client="alice", kind="forward")
    schedule = Schedule(
        seed=1, policy="sync", steps=(2, 2, 1), tokens=(2,), batches=2, faults=(noise, cause, noise)
    )
    bug = PLANTED["lost acknowledgement"].cast()
    smaller = played.shrunk(schedule, bug)
    assert smaller.faults == (cause,)
    assert (smaller.steps, smaller.tokens, smaller.batches) == ((1, 1), (), 1)
    assert eval(str(smaller)) == smaller
