"""When the trunk steps, and with which weights: pure decisions, no torch, no threads, no clock.

One machine for all policies. A barrier collects contributions and closes with a step once
`policy.quorum_of` the clients that it awaits have contributed (all of them in `sync`, one in
`async`), or `deadline_s` after the first contribution. Whoever is missing at the deadline is no
longer awaited until it shows up again; whoever is late for a quorum is.

A contribution that was made some steps ago is discounted. Where it shares a step with others it
weighs less than theirs. In `async` it is the whole step, and to scale a gradient means nothing to
an optimizer that normalizes it, such as Adam; so there the learning rate is scaled.
"""

import math
from dataclasses import dataclass, replace

from fedsplit.spec import PolicySpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """These clients were sent work; at most `at_once` of them will be at it at a time."""

    clients: frozenset[str]
    at_once: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A client has a training session."""

    client: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """A client's work is over, done or not; what it contributed stays."""

    client: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Contributed:
    """A client's gradient, made when `version` barriers had closed; it weighs `num_tokens`."""

    client: str
    version: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked:
    """Time has passed."""


Event = Expected | Joined | Left | Contributed | Ticked


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Nothing to do yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """The contribution is too old, or its client's second; `current` barriers have closed."""

    current: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Step now with these clients' gradients: weights that sum to one, in the order of names.

    `scale` is a factor on the learning rate.
    """

    weights: dict[str, float]
    scale: float


Decision = Wait | Refuse | Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """A contribution that waits for its barrier; `discount` is for its age."""

    client: str
    num_tokens: int
    discount: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Barrier:
    """The state of the aggregator.

    `version` barriers have closed before this one. `present` clients are at work, `expected` ones
    have yet to join, and there is room for `room` of both at a time. `contributions` are those
    so far, and `deadline` when waiting ends (seconds).
    """

    version: int = 0
    present: frozenset[str] = frozenset()
    expected: frozenset[str] = frozenset()
    room: int = 0
    contributions: tuple[Contribution, ...] = ()
    deadline: float = math.inf

    @property
    def contributors(self) -> frozenset[str]:
        """Who has contributed, and so waits for the end of this barrier."""
        return frozenset(each.client for each in self.contributions)

    @property
    def about_to_join(self) -> int:
        """How many of the expected clients there is room for now."""
        return min(len(self.expected), max(0, self.room - len(self.present)))

    @property
    def num_awaited(self) -> int:
        """Of how many clients this barrier is: contributed, at work, or about to join."""
        return len(self.present | self.contributors) + self.about_to_join


def oldest(policy: PolicySpec) -> int:
    """How many steps a contribution may be behind."""
    if policy.kind == "sync" or (policy.kind == "quorum" and policy.late == "refuse"):
        return 0
    return policy.max_staleness


def advance(
    state: Barrier, event: Event, *, now: float, policy: PolicySpec
) -> tuple[Barrier, Decision]:
    """Take one event in.

    Args:
        state: The barrier before the event.
        event: What happened.
        now: The time of the event, in seconds of any clock that does not run backwards.
        policy: What the run asks for.

    Returns:
        The barrier after the event, and what to do.
    """
    match event:
        case Expected(clients=clients, at_once=at_once):
            others = replace(
                state, present=state.present - clients, expected=state.expected - clients
            )
            room = at_once + len(others.present) + others.about_to_join
            expected = (state.expected | clients) - state.present
            state = replace(state, expected=expected, room=room)
        case Joined(client=client):
            state = _with(state, client)
        case Left(client=client):
            gone = {client}
            state = replace(state, present=state.present - gone, expected=state.expected - gone)
        case Contributed(client=client, version=version, num_tokens=num_tokens):
            staleness = state.version - version
            if client in state.contributors or staleness > oldest(policy):
                return state, Refuse(current=state.version)
            discount = policy.discount_of(staleness)
            given = Contribution(client=client, num_tokens=num_tokens, discount=discount)
            deadline = min(state.deadline, now + policy.deadline_s)
            state = replace(
                _with(state, client), contributions=(*state.contributions, given), deadline=deadline
            )
    return _close_if_due(state, now, policy)


def _with(state: Barrier, client: str) -> Barrier:
    both = {client}
    return replace(state, present=state.present | both, expected=state.expected - both)


def _close_if_due(state: Barrier, now: float, policy: PolicySpec) -> tuple[Barrier, Decision]:
    enough = len(state.contributions) >= policy.quorum_of(state.num_awaited)
    if not state.contributions or not (enough or now >= state.deadline):
        return state, Wait()
    following = replace(state, version=state.version + 1, contributions=(), deadline=math.inf)
    if not enough:
        present = state.present & state.contributors
        following = replace(following, present=present, expected=frozenset())
    return following, _step(state.contributions, policy)


def _step(given: tuple[Contribution, ...], policy: PolicySpec) -> Step:
    weights = {each.client: each.num_tokens * each.discount for each in given}
    total = sum(weights.values())
    return Step(
        weights={client: weights[client] / total for client in sorted(weights)},
        scale=given[0].discount if policy.kind == "async" else 1.0,
    )
