"""What a training session may do next: one table of events, when each is legal, what it changes.

Knows no role and no I/O. Both sides could hold one; a call that was answered before is replayed
by the service and never reaches this table.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from fedsplit.errors import ProtocolError

MAX_OUTSTANDING = 1024
"""Forwards that may wait for their backward; an older one counts as skipped."""


class Event(Enum):
    """What a client can do in a session."""

    FORWARD = "forward"
    BACKWARD = "backward"
    EXPIRED = "expired backward"
    STEP = "step"
    GENERATE = "generate"


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionState:
    """Where a session stands.

    `last_call` is the highest call that had a forward, `outstanding` are those without their
    backward, in order, and `backwards` counts the ones since the last step.
    """

    last_call: int = -1
    outstanding: tuple[int, ...] = ()
    backwards: int = 0

    def __str__(self) -> str:
        waiting = f"{len(self.outstanding)} forwards outstanding"
        return f"open at call {self.last_call}, {waiting}, {self.backwards} backwards to step with"


def advance(state: SessionState, event: Event, call: int = 0) -> SessionState:
    """The state after `event`; `call` is the one that a forward or backward belongs to.

    A training forward has a new call, or repeats one that still waits for its backward.

    Raises:
        ProtocolError: The event is not legal now.

    >>> state = advance(SessionState(), Event.FORWARD, call=7)
    >>> advance(advance(state, Event.BACKWARD, call=7), Event.STEP)
    SessionState(last_call=7, outstanding=(), backwards=0)
    """
    rule = _TABLE[event]
    if not rule.legal(state, call):
        raise ProtocolError(f"{event.value} (call {call}) needs {rule.needs}; session is {state}")
    return rule.after(state, call)


@dataclass(frozen=True, slots=True)
class _Rule:
    needs: str
    legal: Callable[[SessionState, int], bool]
    after: Callable[[SessionState, int], SessionState]


def _forward(state: SessionState, call: int) -> SessionState:
    waiting = sorted({*state.outstanding, call})[-MAX_OUTSTANDING:]
    return replace(state, last_call=max(state.last_call, call), outstanding=tuple(waiting))


def _backward(state: SessionState, call: int) -> SessionState:
    waiting = tuple(other for other in state.outstanding if other != call)
    return replace(state, outstanding=waiting, backwards=state.backwards + 1)


def _expired(state: SessionState, call: int) -> SessionState:
    waiting = tuple(sorted({*state.outstanding, call}))
    return replace(state, outstanding=waiting, backwards=state.backwards - 1)


_TABLE = {
    Event.FORWARD: _Rule(
        "a new call",
        lambda s, call: call > s.last_call or call in s.outstanding,
        _forward,
    ),
    Event.BACKWARD: _Rule(
        "an outstanding forward of the same call", lambda s, call: call in s.outstanding, _backward
    ),
    Event.EXPIRED: _Rule(
        "a backward that found no graph", lambda s, call: s.backwards > 0, _expired
    ),
    Event.STEP: _Rule(
        "a backward since the last step",
        lambda s, call: s.backwards > 0,
        lambda s, call: replace(s, backwards=0),
    ),
    Event.GENERATE: _Rule(
        "a new call",
        lambda s, call: call > s.last_call,
        lambda s, call: replace(s, last_call=call),
    ),
}
