"""Rank 0 sends its turns, and the engines of the other ranks run them."""

import queue

import pytest
import torch

from fedsplit.errors import NonFinite
from fedsplit.ranks.messages import read, tensors_of, written
from fedsplit.spec import RunSpec
from fedsplit.trunk.aggregator import Barrier
from fedsplit.trunk.call import Call, Kind
from fedsplit.trunk.turns import RENEW, Order, Outcome, Turn, scheduler_for
from fedsplit.wire.messages import BackwardRequest, CloseRequest, ForwardRequest, StepRequest
from tests.core.worlds import Clock


class Lost(Exception):
    """In place of the end of the process."""


class Pipe:
    """A channel of two schedulers in one process, which carries bytes and tensors."""

    def __init__(self, rank, messages):
        self.rank = rank
        self._messages = messages

    def send(self, message):
        self._messages.put((*written(message), tensors_of(message)))

    def receive(self):
        header, frames, tensors = self._messages.get_nowait()
        message = read(header, frames)
        for empty, tensor in zip(tensors_of(message), tensors, strict=True):
            empty.copy_(tensor)
        return message

    def fail(self, reason):
        raise Lost(reason)


@pytest.fixture
def ranks():
    messages, clock = queue.Queue(), Clock()
    pair = [scheduler_for(RunSpec(), clock, lambda _: False, Pipe(i, messages)) for i in range(2)]
    return *pair, clock


REQUESTS = {
    "forward": ForwardRequest(
        session="s",
        call=3,
        training=True,
        smashed_BTD=torch.randn(2, 3, 4),
        attention_mask_BT=torch.ones(2, 3, dtype=torch.int64),
        codec="int8",
    ),
    "backward": BackwardRequest(
        session="s", call=3, want_grad=True, grad_trunk_out_BTD=torch.randn(2, 3, 4)
    ),
    "step": StepRequest(session="s", call=3, step=0, num_tokens=4, client_sq_norm=0.1),
    "close": CloseRequest(session="s"),
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_call_arrives_with_the_very_values_of_rank_0(kind):
    call = Call(kind=Kind.FORWARD, client="a", session="s", round=2, request=REQUESTS[kind])
    outcome = Outcome(steps=1, norm=0.1)
    turn = read(*written(Turn(now=1.5, pass_s=0.1, calls=[call], outcome=outcome)))
    (got,) = turn.calls
    assert (turn.now, turn.pass_s, turn.outcome) == (1.5, 0.1, outcome)
    assert (got.kind, got.client, got.session, got.round) == (Kind.FORWARD, "a", "s", 2)
    for name in ("smashed_BTD", "attention_mask_BT", "grad_trunk_out_BTD", "client_sq_norm"):
        sent, received = (getattr(r, name, None) for r in (call.request, got.request))
        assert sent is received is None or torch.equal(
            torch.as_tensor(sent), torch.as_tensor(received)
        )


def test_an_order_names_the_tensors_that_follow_it():
    state = {"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.int64)}
    got = read(*written(Order("load_state", ("x", 1, None), state)))
    assert (got.name, got.arguments) == ("load_state", ("x", 1, None))
    assert {k: (t.shape, t.dtype) for k, t in got.state.items()} == {
        k: (t.shape, t.dtype) for k, t in state.items()
    }


def test_an_order_that_is_called_arrives_with_its_tensors(ranks):
    first, other, _ = ranks
    sent = Order("receive", ("s", 24, 1), {"a": torch.randn(2, 3), "b": torch.randn(4)})
    for order in (sent, Order("receive", ("s", 24, 1), {})):
        first.submit(Call(kind=Kind.CONTROL, request=order))
        first.next_batch(Barrier(), 0.0)
        (call,) = other.next_batch(Barrier(), 0.0)
        assert (call.request.name, call.request.arguments) == ("receive", ("s", 24, 1))
        assert call.request.state.keys() == order.state.keys()
        assert all(torch.equal(call.request.state[k], v) for k, v in order.state.items())


def test_another_rank_gets_the_calls_and_the_time_but_not_what_concerns_the_queue(ranks):
    first, other, clock = ranks
    clock.now = 7.0
    first.submit(Call(kind=Kind.CONTROL, request=lambda: None))
    assert len(first.next_batch(Barrier(), 0.0)) == 1
    assert other.next_batch(Barrier(), 0.0) == []
    first.submit(Call(kind=Kind.CLOSE, session="s"))
    first.next_batch(Barrier(), 0.0)
    clock.now = 9.0
    (call,) = other.next_batch(Barrier(), 0.0)
    assert (call.kind, call.session) == (Kind.CLOSE, "s")
    assert first.turn_time() == other.turn_time() == other.now == 7.0


def test_another_rank_begins_a_pass_when_rank_0_does(ranks):
    first, other, _ = ranks
    assert first.has_arrivals(1) is other.has_arrivals(1) is False
    first.submit(Call(kind=Kind.BACKWARD))
    assert first.has_arrivals(1) is other.has_arrivals(1) is True


def test_orders_between_turns_run_before_the_next_one(ranks):
    first, other, _ = ranks
    ran = []
    other.run_order = ran.append
    first.announce(Order("state"))
    first.next_batch(Barrier(), 0.0)
    other.next_batch(Barrier(), 0.0)
    assert [order.name for order in ran] == ["state"]


def test_ranks_that_have_computed_something_else_end(ranks):
    first, other, _ = ranks
    first.failed(NonFinite("it was refused"))
    first.next_batch(Barrier(), 0.0)
    with pytest.raises(Lost, match="rank 1 has computed .*refused=0.* but rank 0 .*refused=1"):
        other.next_batch(Barrier(), 0.0)


def test_a_rank_that_cannot_compute_ends_all(ranks):
    _, other, _ = ranks
    with pytest.raises(Lost, match=r"rank 1 failed \(RuntimeError: out of memory\)"):
        other.failed(RuntimeError("out of memory"))


@pytest.mark.parametrize("is_renewed", [True, False])
def test_an_engine_ends_when_rank_0_says_so(ranks, is_renewed):
    first, other, _ = ranks
    first._channel.send(Order(RENEW) if is_renewed else None)
    assert other.next_batch(Barrier(), 0.0) == []
    assert other.closed
    assert other.is_renewed == is_renewed
