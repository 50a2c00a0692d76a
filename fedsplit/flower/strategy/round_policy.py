"""When a round closes, and with which weights replies are merged: pure functions without a clock.

A round opens when clients are sent work with the current client weights. The policy closes it:

* `sync` waits for all replies.
* `quorum` waits for `PolicySpec.quorum_of` replies, or for its deadline. A late client continues
  its work and gets no further work. Its reply is merged at the end of the round in which it
  arrives, with a smaller weight (`PolicySpec.discount_of`), unless it is too old.
* `async` merges each reply when it arrives (FedAsync; Xie, Koyejo and Gupta 2019, "Asynchronous
  Federated Optimization", arXiv 1903.03934), or every `buffer` replies (FedBuff; Nguyen et al.
  2022, "Federated Learning with Buffered Asynchronous Aggregation", AISTATS, arXiv 2106.06639),
  and sends that client new work at once. A round has as many replies as clients had work at its
  start.

A client with work cannot evaluate, and its work is in no checkpoint. So a round that is evaluated
or saved, and the last round, drains before it closes: no client gets new work, and the round waits
for the clients that `Drain` selects.
"""

import math
from dataclasses import dataclass, field, replace
from enum import Enum

from fedsplit.spec import PolicySpec


class Drain(Enum):
    """The clients that an asynchronous round waits for; `ALL` applies to a round of any policy.

    `RETURNED` selects the clients that have replied in this round before, and fast: their next
    replies arrive soon. A client that takes longer than a round, or more than twice as long as the
    fastest one, is not waited for and does not evaluate.
    """

    NONE = "none"
    RETURNED = "returned"
    ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One client's work of a round, with a version of the client weights; `number` identifies it.

    `since` is the time at which it was sent, in seconds of the policy's clock.
    """

    number: int
    client: str
    round: int
    version: int
    since: float = 0.0


# --- events ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A round opens, or continues with other clients; these clients are sent work."""

    round: int
    clients: tuple[str, ...]
    deadline: float
    drain: Drain


@dataclass(frozen=True, slots=True, kw_only=True)
class Replied:
    """A client has trained on `num_tokens` tokens and replied (0: there is nothing to merge).

    With `again` the client may get new work, unless there is nothing to merge.
    """

    number: int
    num_tokens: int
    again: bool = True

    @property
    def gets_work(self) -> bool:
        """Whether the client may get new work in the same round."""
        return self.again and self.num_tokens > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A client's work has failed."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked:
    """Time has passed."""


Event = Opened | Replied | Failed | Ticked


# --- decisions ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One reply's weight in a merge, and the discount for its staleness."""

    work: Work
    discount: float
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do now, in this order.

    `dropped` work is too old to merge, or has nothing to merge. `merge` has the shares of the
    replies to merge now; their weights sum to one. `send` is the work to send, with the client
    weights after the merge. `closed` says that the round is over.
    """

    dropped: tuple[Work, ...] = ()
    merge: tuple[Share, ...] = ()
    send: tuple[Work, ...] = ()
    closed: bool = False


# --- the state ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundState:
    """The state of a run's rounds.

    `busy` is the work that clients do now, `arrived` the work that is done and not merged yet. Of
    the current round, `first` is the number of its first work, `wanted` the number of replies it
    waits for, `num_replies` the number that have arrived, and `returned` the seconds that each
    client took.
    """

    round: int = 0
    is_open: bool = False
    version: int = 0
    sent: int = 0
    busy: tuple[Work, ...] = ()
    arrived: tuple[tuple[Work, int], ...] = ()
    first: int = 0
    wanted: int = 0
    num_replies: int = 0
    returned: dict[str, float] = field(default_factory=dict)
    deadline: float = math.inf
    drain: Drain = Drain.NONE

    def work(self, number: int) -> Work:
        """Return the busy client's work of this number."""
        return next(work for work in self.busy if work.number == number)

    @property
    def awaited(self) -> tuple[Work, ...]:
        """The work of this round that clients do now."""
        return tuple(work for work in self.busy if work.number >= self.first)


def advance(
    state: RoundState, event: Event, *, now: float, policy: PolicySpec
) -> tuple[RoundState, Decision]:
    """Apply one event.

    Args:
        state: The state before the event.
        event: The event. Its number must be that of busy work.
        now: The time of the event, in seconds of the policy's clock.
        policy: The run's policy.

    Returns:
        The state after the event, and what to do.

    Raises:
        ValueError: A round is opened while one is open, or after a later round.
    """
    client = ""
    match event:
        case Opened():
            return _open(state, event, now, policy)
        case Replied():
            client = state.work(event.number).client
            state, decision = _take(state, event, now, policy)
        case Failed(number=number):
            state, decision = _without(state, number), Decision()
        case Ticked():
            decision = Decision()
    again = isinstance(event, Replied) and event.gets_work and _continues(state, policy)
    waits = again or _awaited(state, policy)
    over = state.is_open and (now >= state.deadline or not waits)
    due = len(state.arrived) >= policy.buffer if policy.kind == "async" else over
    if due or (over and state.drain is Drain.ALL):
        state, decision = _merge(state, decision, policy)
    if over:
        state = replace(state, is_open=False, num_replies=0, returned={}, deadline=math.inf)
        return state, replace(decision, closed=True)
    if again:
        state, sent = _send(state, (client,), now)
        decision = replace(decision, send=sent.send)
    return state, decision


def _open(
    state: RoundState, event: Opened, now: float, policy: PolicySpec
) -> tuple[RoundState, Decision]:
    if state.is_open or event.round < state.round:
        raise ValueError(f"round {event.round} cannot open: {state}")
    out = len(state.busy) + len(event.clients)
    state = replace(
        state,
        round=event.round,
        is_open=True,
        first=state.sent + 1,
        wanted=out if policy.kind == "async" else policy.quorum_of(len(event.clients)),
        deadline=event.deadline,
        drain=event.drain,
    )
    return _send(state, event.clients, now)


def _send(state: RoundState, clients: tuple[str, ...], now: float) -> tuple[RoundState, Decision]:
    works = tuple(
        Work(number=number, client=client, round=state.round, version=state.version, since=now)
        for number, client in enumerate(clients, start=state.sent + 1)
    )
    state = replace(state, busy=state.busy + works, sent=state.sent + len(works))
    return state, Decision(send=works)


def _take(
    state: RoundState, event: Replied, now: float, policy: PolicySpec
) -> tuple[RoundState, Decision]:
    work = state.work(event.number)
    state = _without(state, event.number)
    # A client could otherwise end a round, for all others, by replies without any work.
    if not event.num_tokens:
        return state, Decision(dropped=(work,))
    # A late reply of an earlier round counts in this one only where rounds are not synchronized.
    fresh = state.is_open and work.number >= state.first
    counts = fresh or policy.kind == "async"
    returned = state.returned | {work.client: now - work.since}
    state = replace(state, num_replies=state.num_replies + counts, returned=returned)
    most = 0 if policy.kind == "sync" else policy.max_staleness
    is_late = state.version - work.version > most or (policy.kind == "sync" and not fresh)
    if is_late:
        return state, Decision(dropped=(work,))
    return replace(state, arrived=(*state.arrived, (work, event.num_tokens))), Decision()


def _without(state: RoundState, number: int) -> RoundState:
    work = state.work(number)
    return replace(state, busy=tuple(other for other in state.busy if other != work))


def _awaited(state: RoundState, policy: PolicySpec) -> tuple[Work, ...]:
    """Return the work that the round waits for before it closes."""
    if policy.kind == "sync":
        return state.awaited  # a client that was given up may never reply
    if state.drain is Drain.ALL:
        return state.busy
    if state.num_replies < state.wanted:
        return state.busy if policy.kind == "async" else state.awaited
    if policy.kind == "async" and state.drain is Drain.RETURNED:
        # Twice the fastest client's time: see `Drain.RETURNED`.
        longest = 2 * min(state.returned.values(), default=0.0)
        soon = {client for client, seconds in state.returned.items() if seconds <= longest}
        return tuple(work for work in state.busy if work.client in soon)
    return ()


def _merge(
    state: RoundState, decision: Decision, policy: PolicySpec
) -> tuple[RoundState, Decision]:
    if not state.arrived:
        return state, decision
    # By client, not by arrival: a sum of floats depends on its order.
    found = sorted(state.arrived, key=lambda arrival: (arrival[0].client, arrival[0].number))
    discounts = [policy.discount_of(state.version - work.version) for work, _ in found]
    if policy.kind == "async":  # equal weights; each reply has its own mixing rate
        weights = [1.0] * len(found)
    else:
        weights = [tokens * d for (_, tokens), d in zip(found, discounts, strict=True)]
    shares = tuple(
        Share(work=work, discount=discount, weight=weight / sum(weights))
        for (work, _), discount, weight in zip(found, discounts, weights, strict=True)
    )
    state = replace(state, arrived=(), version=state.version + 1)
    return state, replace(decision, merge=shares)


def _continues(state: RoundState, policy: PolicySpec) -> bool:
    """Return whether a client that replied gets new work in the same round."""
    return policy.kind == "async" and state.is_open and state.num_replies < state.wanted
