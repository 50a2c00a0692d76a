"""The legal order of requests in a session: a table of events, their conditions and effects.

The table has no I/O and is the same for both sides. The service answers a repeated call from its
stored reply, so such a call does not reach this table.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from fedsplit.errors import ProtocolError

MAX_OUTSTANDING = 1024
"""The most forwards that may wait for their backward; older ones are dropped."""


class Event(Enum):
    """An event in a session: a request of its client, or the loss of a graph."""

    FORWARD = "forward"
    BACKWARD = "backward"
    EXPIRED = "expired backward"
    STEP = "step"
    CONTRIBUTE = "contribute"
    GENERATE = "generate"


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionState:
    """The state of a session.

    `last_call` is the highest call that had a forward, `outstanding` the calls whose backward is
    missing, in order, `backwards` the number of backwards since the last step, and `last_step` the
    call of that step.
    """

    last_call: int = -1
    outstanding: tuple[int, ...] = ()
    backwards: int = 0
    last_step: int = -1

    def __str__(self) -> str:
        waiting = f"{len(self.outstanding)} forwards outstanding"
        return f"open at call {self.last_call}, {waiting}, {self.backwards} backwards to step with"


def advance(state: SessionState, event: Event, call: int = 0) -> SessionState:
    """The state after `event`; `call` is the number of the forward, backward or step.

    A training forward has a new call, or repeats one that still waits for its backward.

    Raises:
        ProtocolError: The event is not legal now.

    >>> state = advance(SessionState(), Event.FORWARD, call=7)
    >>> advance(advance(state, Event.BACKWARD, call=7), Event.STEP, call=7)
    SessionState(last_call=7, outstanding=(), backwards=0, last_step=7)
    """
    rule = TABLE[event]
    if not rule.legal(state, call):
        raise ProtocolError(
            f"{event.value} (call {call}) needs {rule.needs}, but the session is {state}"
        )
    return rule.after(state, call)


@dataclass(frozen=True, slots=True)
class Rule:
    """A row of the table.

    Attributes:
        needs: What the event needs, in words.
        effect: What it changes, in words.
        legal: Whether a state allows the event of a call.
        after: The state after it.
    """

    needs: str
    effect: str
    legal: Callable[[SessionState, int], bool]
    after: Callable[[SessionState, int], SessionState]


def _forward(state: SessionState, call: int) -> SessionState:
    waiting = sorted({*state.outstanding, call})[-MAX_OUTSTANDING:]
    return replace(state, last_call=max(state.last_call, call), outstanding=tuple(waiting))


def _backward(state: SessionState, call: int) -> SessionState:
    waiting = tuple(other for other in state.outstanding if other != call)
    return replace(state, outstanding=waiting, backwards=state.backwards + 1)


def _expired(state: SessionState, call: int) -> SessionState:
    # The service counts a backward when it begins; one whose graph has expired is taken back.
    waiting = tuple(sorted({*state.outstanding, call}))
    return replace(state, outstanding=waiting, backwards=state.backwards - 1)


TABLE = {
    Event.FORWARD: Rule(
        "a new call",
        "the call is outstanding: it waits for its backward",
        lambda s, call: call > s.last_call or call in s.outstanding,
        _forward,
    ),
    Event.BACKWARD: Rule(
        "an outstanding forward of the same call",
        "the call is outstanding no more; one more backward to step with",
        lambda s, call: call in s.outstanding,
        _backward,
    ),
    Event.EXPIRED: Rule(
        "a backward that found no graph",
        "the call is outstanding again; one backward less to step with",
        lambda s, call: s.backwards > 0,
        _expired,
    ),
    Event.STEP: Rule(
        # A copy of an earlier step may come so late that its reply is no longer kept.
        "a backward since the last step, and a later call than that one's",
        "no backward to step with",
        lambda s, call: s.backwards > 0 and call > s.last_step,
        lambda s, call: replace(s, backwards=0, last_step=call),
    ),
    Event.CONTRIBUTE: Rule(
        # The forwards and backwards of this step were at a follower.
        "a later call than that of the last step",
        "the call is that of the last step",
        lambda s, call: call > s.last_step,
        lambda s, call: replace(s, last_call=max(s.last_call, call), backwards=0, last_step=call),
    ),
    Event.GENERATE: Rule(
        "a new call",
        "the call is the last one",
        lambda s, call: call > s.last_call,
        lambda s, call: replace(s, last_call=call),
    ),
}
"""The rule of each event."""
