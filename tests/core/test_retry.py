"""How a client tries again, on a clock of its own."""

import random

import pytest

from fedsplit import errors
from fedsplit.client.rpc import Retry


class Attempts:
    """Fails with the given errors one after the other, then succeeds; keeps its own time."""

    def __init__(self, *failures):
        self.failures, self.now, self.waits = list(failures), 0.0, []

    def __call__(self):
        self.now += 1.0
        if self.failures:
            raise self.failures.pop(0)
        return "done"

    def sleep(self, seconds):
        self.waits.append(seconds)
        self.now += seconds

    def run(self, budget_s=100.0):
        return Retry(budget_s, random.Random(0), sleep=self.sleep, clock=lambda: self.now)(self)


def test_what_may_pass_is_tried_again_with_growing_waits():
    attempts = Attempts(*(errors.ConnectionLost("gone") for _ in range(5)))
    assert attempts.run() == "done"
    assert len(attempts.waits) == 5
    assert all(0 <= wait <= 0.2 * 2**i for i, wait in enumerate(attempts.waits))


def test_a_peer_that_names_a_time_is_heeded():
    attempts = Attempts(errors.Overloaded("full", retry_after_s=7.0))
    assert attempts.run() == "done"
    assert attempts.waits == [7.0]


def test_a_repetition_is_logged_with_its_reason(caplog):
    Attempts(errors.Overloaded("full", retry_after_s=7.0), errors.ConnectionLost("gone")).run()
    first, second = caplog.messages
    assert first == "OVERLOADED: 'full'; trying again in 7.0 s"
    assert second.startswith("CONN_LOST: 'gone'; trying again in ")


def test_a_long_outage_is_logged_ever_more_rarely(caplog):
    Attempts(*(errors.Overloaded("full\n", retry_after_s=0.1) for _ in range(70))).run()
    assert len(caplog.messages) == 7
    assert all("\n" not in line for line in caplog.messages)


def test_what_cannot_pass_is_raised_at_once(caplog):
    attempts = Attempts(errors.ModelMismatch("other model"))
    with pytest.raises(errors.ModelMismatch):
        attempts.run()
    assert attempts.waits == caplog.messages == []


def test_a_fault_of_the_other_side_is_given_one_more_chance():
    attempts = Attempts(errors.Internal("boom"), errors.ConnectionLost("gone"))
    assert attempts.run() == "done"
    assert len(attempts.waits) == 2
    attempts = Attempts(errors.Internal("boom"), errors.Internal("again"))
    with pytest.raises(errors.Internal, match="again"):
        attempts.run()
    assert len(attempts.waits) == 1


def test_the_budget_ends_it_with_the_last_error():
    attempts = Attempts(*(errors.Draining(f"try {i}") for i in range(1000)))
    with pytest.raises(errors.Draining, match="try"):
        attempts.run(budget_s=30.0)
    assert attempts.now <= 30.0 + 1.0
