"""The guard of the client weights: what it clips, what it refuses, and what it compares with."""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict

from fedsplit.errors import GradExploded
from fedsplit.flower.records import ARRAYS, METRICS
from fedsplit.flower.strategy.weight_guard import WeightGuard
from fedsplit.spec import GuardSpec

SENT = ArrayRecord({"w": torch.zeros(2, 2), "b": torch.ones(3)})


def moved(norm, steps=1):
    """A checked reply whose change has this norm."""
    content = RecordDict({METRICS: MetricRecord({"steps": steps})})
    content[ARRAYS] = ArrayRecord({"w": torch.full((2, 2), norm / 2), "b": torch.ones(3)})
    return content


def norm_of(content):
    return float(np.linalg.norm(content[ARRAYS]["w"].numpy()))


@pytest.fixture
def guard():
    """A guard after four changes of norm 1."""
    guard = WeightGuard(GuardSpec(after=4), clients=2, memory=1000)
    for _ in range(2):
        for client in ("a", "b"):
            guard.bounded(client, moved(1.0), SENT)
        guard.end_round()
    return guard


def test_the_first_changes_may_have_any_norm():
    guard = WeightGuard(GuardSpec(after=4), clients=2, memory=1000)
    assert norm_of(guard.bounded("a", moved(1e6), SENT)) == pytest.approx(1e6)


def test_the_guard_begins_in_the_second_round():
    guard = WeightGuard(GuardSpec(), clients=4, memory=1000)
    for client in "abc":
        guard.bounded(client, moved(1.0), SENT)
    guard.end_round()
    with pytest.raises(GradExploded):
        guard.bounded("d", moved(300.0), SENT)


def test_an_honest_change_keeps_its_bits(guard):
    content = moved(9.9)
    assert guard.bounded("a", content, SENT) is content


def test_a_large_change_is_clipped_and_a_huge_one_refused(guard):
    assert norm_of(guard.bounded("a", moved(50.0), SENT)) == pytest.approx(10.0)
    with pytest.raises(GradExploded, match=r"norm 1e\+06 a step, and at most 100 is accepted"):
        guard.bounded("a", moved(1e6), SENT)


def test_more_steps_may_change_more(guard):
    content = moved(900.0, steps=100)
    assert guard.bounded("a", content, SENT) is content


def test_a_round_is_compared_with_those_before_it_only(guard):
    for _ in range(100):
        guard.bounded("a", moved(1e-6), SENT)
    content = moved(9.9)
    assert guard.bounded("b", content, SENT) is content


def test_a_client_that_is_behind_in_the_schedule_may_change_more(guard):
    """In policy=async a slow client still has a high learning rate, when that of others is 0."""
    for _ in range(100):
        guard.bounded("a", moved(0.0), SENT)
        guard.end_round()
    content = moved(1.0)
    assert guard.bounded("b", content, SENT) is content


def test_a_resumed_run_continues_with_the_norms(guard):
    resumed = WeightGuard(GuardSpec(after=4), clients=2, memory=1000)
    resumed.load_state(guard.state())
    with pytest.raises(GradExploded):
        resumed.bounded("a", moved(1e6), SENT)


def test_a_reply_without_steps_or_weights_has_no_norm(guard):
    guard.bounded("a", moved(1e6, steps=0), SENT)
    guard.bounded("a", RecordDict({METRICS: MetricRecord({"steps": 1})}), ArrayRecord())
    before = guard.state()
    guard.end_round()
    assert guard.state() == before
