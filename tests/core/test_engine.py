"""The engine when clients break the rules, and when it fails itself: nobody waits in vain."""

import threading
import time
from dataclasses import replace

import pytest

from fedsplit import errors
from fedsplit.spec import PolicySpec
from tests.core.requests import ask, backward_of, forward_of, step, step_of
from tests.core.worlds import same, small_run, world


def two_clients(config, *, greedy):
    """The trunk's weights after alice and bob have stepped; alice twice if she is greedy."""
    with world(config) as here:
        alice, bob = here.add("alice"), here.add("bob")
        alice.trunk.open(), bob.trunk.open()
        first, second = forward_of(alice, call=0), forward_of(alice, call=1)
        for request in (first, second, backward_of(first), step_of(first)):
            ask(here, "alice", request)
        if greedy:
            ask(here, "alice", backward_of(second))
            with pytest.raises(errors.StaleVersion, match="repeat the step"):
                ask(here, "alice", step_of(second))
        step(bob, 0)
        bob.trunk.close(), alice.trunk.close()
    assert here.service.engine.version == 1
    return here.trunk_weights()


def test_a_second_contribution_to_a_barrier_leaves_the_first_alone(tiny_llama):
    once, twice = (two_clients(tiny_llama(), greedy=greedy) for greedy in (False, True))
    assert same(once, twice)


def test_one_that_never_goes_back_keeps_a_few_versions_only(tiny_llama):
    with world(tiny_llama(), small_run(policy=PolicySpec(deadline_s=0.01))) as here:
        alice, bob = here.add("alice"), here.add("bob")
        alice.trunk.open(), bob.trunk.open()
        ask(here, "bob", forward_of(bob))
        for number in range(6):
            step(alice, number)
        assert len(here.service.engine.training.shared.versions._leaves) <= 3
        with pytest.raises(errors.ActivationExpired, match="graph of call 0 is gone"):
            ask(here, "bob", backward_of(forward_of(bob)))
        with pytest.raises(errors.StaleVersion, match="bob began this step with version 0"):
            ask(here, "bob", forward_of(bob))


def test_a_step_that_fails_fails_its_barrier_and_the_trunk(tiny_llama, caplog):
    def no_memory(*_):
        raise RuntimeError("no memory for this step")

    with world(tiny_llama()) as here:
        alice, bob = here.add("alice"), here.add("bob")
        alice.trunk.open(), bob.trunk.open()
        here.service.engine.training.shared.versions.step = no_memory
        step(alice, 0)
        outcome = []

        def wait_at_the_barrier():
            try:
                step(alice, 1)
            except errors.FedsplitError as error:
                outcome.append(error)

        waiting = threading.Thread(target=wait_at_the_barrier)
        waiting.start()
        while not here.service.engine.num_waiting:
            time.sleep(0.01)
        step(bob, 0)
        waiting.join(10.0)
        told = "the trunk failed at version 0 .RuntimeError. and serves nothing more"
        assert [type(error) for error in outcome] == [errors.Internal]
        for refused in (
            lambda: bob.trunk.open(),
            lambda: here.service.expect(["alice"], round=2, at_once=1, close_after=1),
        ):
            with pytest.raises(errors.Internal, match=told):
                refused()
        assert str(here.service.trunks[""].exception(10.0)) == "no memory for this step"
    (logged,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert logged.exc_info and "at version 0" in logged.message


def test_a_turn_that_fails_before_it_answers_fails_its_call(tiny_llama):
    with world(tiny_llama()) as here:
        alice = here.add("alice")
        alice.trunk.open()

        def divide():
            raise ZeroDivisionError("no clock")

        here.service.engine.training.drop_expired = divide
        with pytest.raises(errors.Internal, match="the trunk failed at version 0"):
            ask(here, "alice", forward_of(alice))


def test_a_trunk_that_is_stopped_has_not_failed(tiny_llama):
    with world(tiny_llama()) as here:
        ended = here.service.trunks[""]
        assert not ended.done()
    assert ended.exception(10.0) is None


def test_what_comes_after_the_end_is_refused(tiny_llama):
    with world(tiny_llama()) as here:
        alice = here.add("alice")
        alice.trunk.open()
    with pytest.raises(errors.Draining, match="shutting down; no new work"):
        ask(here, "alice", forward_of(alice))


def test_a_connection_that_breaks_after_the_end_starts_no_clock(tiny_llama):
    with world(tiny_llama()) as here:
        alice = here.add("alice")
        alice.trunk.open()
        ask(here, "alice", forward_of(alice))
    before = threading.active_count()
    here.service.disconnected(alice.trunk._named_session())
    assert threading.active_count() == before


def test_a_gradient_of_another_shape_is_refused(tiny_llama):
    with world(tiny_llama()) as here:
        alice = here.add("alice")
        alice.trunk.open()
        request = forward_of(alice)
        ask(here, "alice", request)
        short = replace(request, smashed_BTD=request.smashed_BTD[:, :3])
        with pytest.raises(errors.BadTensor, match=r"shape \(2, 3, 16\) .* shape \(2, 12, 16\)"):
            ask(here, "alice", backward_of(short))
        assert here.service.engine.stashed_bytes == 0
