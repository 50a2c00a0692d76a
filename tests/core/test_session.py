"""The session's table: what may follow what."""

import pytest

from fedsplit.errors import ProtocolError
from fedsplit.wire.session import MAX_OUTSTANDING, Event, SessionState, advance

F, B, X, S = Event.FORWARD, Event.BACKWARD, Event.EXPIRED, Event.STEP


def play(*events: tuple[Event, int]) -> SessionState:
    state = SessionState()
    for event, call in events:
        state = advance(state, event, call)
    return state


@pytest.mark.parametrize(
    ("events", "outstanding", "backwards"),
    [
        pytest.param([(F, 0), (B, 0), (S, 0), (F, 1), (B, 1), (S, 1)], (), 0, id="two steps"),
        pytest.param([(F, 0), (B, 0), (F, 1), (B, 1)], (), 2, id="accumulation"),
        pytest.param([(F, 0), (F, 1), (F, 2), (B, 0), (B, 2)], (1,), 2, id="micro-batches"),
        pytest.param([(F, 0), (B, 0), (F, 1), (S, 0), (B, 1)], (), 1, id="forward ahead of step"),
        pytest.param([(F, 3), (F, 3), (B, 3)], (), 1, id="forward repeated after expiry"),
        pytest.param([(F, 0), (B, 0), (X, 0), (F, 0), (B, 0)], (), 1, id="backward expired"),
    ],
)
def test_legal_orders(
    events: list[tuple[Event, int]], outstanding: tuple[int, ...], backwards: int
) -> None:
    state = play(*events)
    assert (state.outstanding, state.backwards) == (outstanding, backwards)


@pytest.mark.parametrize(
    ("before", "event", "call", "text"),
    [
        pytest.param([], B, 0, "backward .call 0. needs an outstanding forward", id="backward"),
        pytest.param([(F, 0)], B, 1, "open at call 0, 1 forwards outstanding", id="other call"),
        pytest.param([(F, 0), (B, 0)], B, 0, "needs an outstanding forward", id="backward twice"),
        pytest.param([(F, 0)], S, 0, "step .* needs a backward since the last", id="step"),
        pytest.param([(F, 0), (B, 0), (S, 0)], S, 0, "0 backwards to step with", id="step twice"),
        pytest.param(
            [(F, 0), (B, 0), (S, 0), (F, 1), (B, 1)], S, 0, "a later call", id="late copy of a step"
        ),
        pytest.param([(F, 1), (B, 1)], F, 1, "needs a new call", id="old call"),
        pytest.param(
            [(F, 1)], F, 0, "new call, but the session is open at call 1", id="earlier call"
        ),
        pytest.param([(F, 0)], X, 0, "needs a backward that found no graph", id="expired"),
    ],
)
def test_illegal_orders_name_event_and_state(
    before: list[tuple[Event, int]], event: Event, call: int, text: str
) -> None:
    state = play(*before)
    with pytest.raises(ProtocolError, match=text):
        advance(state, event, call)


def test_a_client_that_never_sends_a_backward_costs_bounded_memory() -> None:
    state = play(*((F, call) for call in range(MAX_OUTSTANDING + 5)))
    assert len(state.outstanding) == MAX_OUTSTANDING
    with pytest.raises(ProtocolError, match="needs an outstanding forward"):
        advance(state, B, 4)
    assert advance(state, B, 5).backwards == 1
