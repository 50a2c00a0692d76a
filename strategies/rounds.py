"""When a round closes and what is merged with which weight: pure decisions, no clock, no flwr.

A round begins when clients are sent out with the current halves, and closes by the policy:

* `sync` waits for all of them.
* `quorum` waits for as many as `PolicySpec.quorum_of` says, or for its deadline. Who is late goes
  on and is not asked again; what it brings is merged at the end of the round in which it comes,
  and weighs less (`PolicySpec.discount_of`), unless it is too old.
* `async` merges a reply as it comes (FedAsync; Xie, Koyejo and Gupta 2019, "Asynchronous Federated
  Optimization", arXiv 1903.03934), or every `buffer` replies (FedBuff; Nguyen et al. 2022,
  "Federated Learning with Buffered Asynchronous Aggregation", AISTATS, arXiv 2106.06639), and
  sends its client out again at once. A round is as many replies as clients were out at its start.

Clients that are at work cannot be asked to evaluate, and what they hold is in no checkpoint. So
where a round is evaluated or kept, or is the last, it drains before it closes: nobody is sent out
again, and who has to come back (`Drain`) is waited for.
"""

import math
from dataclasses import dataclass, field, replace
from enum import Enum

from fedsplit.spec import PolicySpec


class Drain(Enum):
    """Who has to come back before an asynchronous round closes, or, with `ALL`, any round.

    `RETURNED` are the clients that have been back in this round before, and fast: they will soon
    be there again. One that takes longer than a round, or more than twice as long as the fastest,
    stays out and is left out of the evaluation.
    """

    NONE = "none"
    RETURNED = "returned"
    ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A client at work: sent out in a round with a version of the halves, as the `number`-th.

    `since` is when, in seconds of the policy's clock.
    """

    number: int
    client: str
    round: int
    version: int
    since: float = 0.0


# --- what happens ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A round begins, or goes on with other clients, and these are sent out."""

    round: int
    clients: tuple[str, ...]
    deadline: float
    drain: Drain


@dataclass(frozen=True, slots=True, kw_only=True)
class Replied:
    """Work is done: halves that were trained on so many tokens (0: there is nothing to merge).

    With `again` the client may be sent out again.
    """

    number: int
    num_tokens: int
    again: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A piece of work will never be done."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked:
    """Time has passed."""


Event = Opened | Replied | Failed | Ticked


# --- what to do -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one reply counts in a merge: its weight there, and the discount for its staleness."""

    work: Work
    discount: float
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do now, in this order.

    `dropped` work is too old, or has nothing, to be merged; `merge` has the shares of what is
    merged now (their weights sum to one), `send` is who is to be sent out with the halves after
    that, and `closed` says that the round is over.
    """

    dropped: tuple[Work, ...] = ()
    merge: tuple[Share, ...] = ()
    send: tuple[Work, ...] = ()
    closed: bool = False


# --- the state ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """The state of a run's rounds.

    `busy` is who is at work, `arrived` what has come back and is not merged yet. Of the round,
    `first` is the number of the first that was sent out, `wanted` how many replies it waits for,
    `came` how many there are, `returned` whose, with the seconds that each took.
    """

    round: int = 0
    is_open: bool = False
    version: int = 0
    sent: int = 0
    busy: tuple[Work, ...] = ()
    arrived: tuple[tuple[Work, int], ...] = ()
    first: int = 0
    wanted: int = 0
    came: int = 0
    returned: dict[str, float] = field(default_factory=dict)
    deadline: float = math.inf
    drain: Drain = Drain.NONE

    def work(self, number: int) -> Work:
        """The piece of work of this number, whose client is at it."""
        return next(work for work in self.busy if work.number == number)

    @property
    def awaited(self) -> tuple[Work, ...]:
        """Who was sent out in this round and is at work."""
        return tuple(work for work in self.busy if work.number >= self.first)


def advance(
    state: Rounds, event: Event, *, now: float, policy: PolicySpec
) -> tuple[Rounds, Decision]:
    """Take one event in.

    Args:
        state: The rounds before the event.
        event: What happened. A number that is not, or no longer, at work is a fault of the caller.
        now: The time of the event, in seconds of the policy's clock.
        policy: The run's.

    Returns:
        The rounds after the event, and what to do.

    Raises:
        ValueError: A round is opened while one is open, or one that is over.
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
    again = isinstance(event, Replied) and event.again and _goes_on(state, policy)
    waits = again or _waited_for(state, policy)
    over = state.is_open and (now >= state.deadline or not waits)
    due = len(state.arrived) >= policy.buffer if policy.kind == "async" else over
    if due or (over and state.drain is Drain.ALL):
        state, decision = _merge(state, decision, policy)
    if over:
        state = replace(state, is_open=False, came=0, returned={}, deadline=math.inf)
        return state, replace(decision, closed=True)
    if again:
        state, sent = _send(state, (client,), now)
        decision = replace(decision, send=sent.send)
    return state, decision


def _open(state: Rounds, event: Opened, now: float, policy: PolicySpec) -> tuple[Rounds, Decision]:
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


def _send(state: Rounds, clients: tuple[str, ...], now: float) -> tuple[Rounds, Decision]:
    works = tuple(
        Work(number=number, client=client, round=state.round, version=state.version, since=now)
        for number, client in enumerate(clients, start=state.sent + 1)
    )
    state = replace(state, busy=state.busy + works, sent=state.sent + len(works))
    return state, Decision(send=works)


def _take(state: Rounds, event: Replied, now: float, policy: PolicySpec) -> tuple[Rounds, Decision]:
    work = state.work(event.number)
    state = _without(state, event.number)
    fresh = state.is_open and work.number >= state.first
    counts = fresh or policy.kind == "async"
    returned = state.returned | {work.client: now - work.since}
    state = replace(state, came=state.came + counts, returned=returned)
    most = 0 if policy.kind == "sync" else policy.max_staleness
    is_late = state.version - work.version > most or (policy.kind == "sync" and not fresh)
    if is_late or not event.num_tokens:
        return state, Decision(dropped=(work,))
    return replace(state, arrived=(*state.arrived, (work, event.num_tokens))), Decision()


def _without(state: Rounds, number: int) -> Rounds:
    work = state.work(number)
    return replace(state, busy=tuple(other for other in state.busy if other != work))


def _waited_for(state: Rounds, policy: PolicySpec) -> tuple[Work, ...]:
    """Who has to come back before the round closes."""
    if policy.kind == "sync":
        return state.awaited  # one that was given up may never come back
    if state.drain is Drain.ALL:
        return state.busy
    if state.came < state.wanted:
        return state.busy if policy.kind == "async" else state.awaited
    if policy.kind == "async" and state.drain is Drain.RETURNED:
        longest = 2 * min(state.returned.values(), default=0.0)
        soon = {client for client, seconds in state.returned.items() if seconds <= longest}
        return tuple(work for work in state.busy if work.client in soon)
    return ()


def _merge(state: Rounds, decision: Decision, policy: PolicySpec) -> tuple[Rounds, Decision]:
    if not state.arrived:
        return state, decision
    found = sorted(state.arrived, key=lambda arrival: (arrival[0].client, arrival[0].number))
    discounts = [policy.discount_of(state.version - work.version) for work, _ in found]
    if policy.kind == "async":  # every reply alike, each with its own mixing rate
        weights = [1.0] * len(found)
    else:
        weights = [tokens * d for (_, tokens), d in zip(found, discounts, strict=True)]
    shares = tuple(
        Share(work=work, discount=discount, weight=weight / sum(weights))
        for (work, _), discount, weight in zip(found, discounts, weights, strict=True)
    )
    state = replace(state, arrived=(), version=state.version + 1)
    return state, replace(decision, merge=shares)


def _goes_on(state: Rounds, policy: PolicySpec) -> bool:
    """Whether a client that came back is sent out again in the same round."""
    return policy.kind == "async" and state.is_open and state.came < state.wanted
