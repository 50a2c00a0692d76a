"""The aggregator: decides when the trunk steps, and with which weight of each client.

It is a pure state machine, without torch, threads and clock, and serves all policies. A barrier
collects contributions. It closes with a step as soon as `policy.quorum_of` the awaited clients have
contributed (all of them in `sync`, one in `async`), or `deadline_s` after the first contribution. A
client that has not contributed at the deadline is not awaited again until it contributes or joins.
Until then, or until it leaves, steps are counted as short. A client that is late for a quorum is
still awaited.

A contribution that was made some steps ago is discounted. In a step with other contributions, it
has a lower weight than theirs. In `async` it is the only one of its step, and an optimizer that
normalizes gradients, such as Adam, is not affected by their scale. So `async` scales the learning
rate.
"""

import math
from dataclasses import dataclass, replace

from fedsplit.spec import PolicySpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Work was sent to these clients; at most `at_once` of them work at a time."""

    clients: frozenset[str]
    at_once: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A client has opened a training session."""

    client: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """A client's work has ended, complete or not; its contributions remain."""

    client: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Contributed:
    """A client's gradient over `num_tokens` tokens, made when `version` barriers had closed."""

    client: str
    version: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked:
    """Time has passed."""


Event = Expected | Joined | Left | Contributed | Ticked


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """The barrier stays open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """The contribution is too old, or the second of its client; `current` barriers have closed."""

    current: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Step now with the gradients of these clients.

    `weights` sum to one and are sorted by client. `scale` is a factor on the learning rate.
    """

    weights: dict[str, float]
    scale: float


Decision = Wait | Refuse | Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """A contribution that waits for its barrier; `discount` is the factor for its age."""

    client: str
    num_tokens: int
    discount: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Barrier:
    """The state of the aggregator.

    `version` barriers have closed before this one. `present` clients are at work, `expected`
    clients have not joined yet, and at most `room` of both work at a time. `contributions` are
    those of this barrier so far. `deadline` is the time at which waiting ends, in seconds.
    `missing` clients were awaited until a deadline and have not come since, and `short` is the
    number of barriers that have closed without such a client.
    """

    version: int = 0
    present: frozenset[str] = frozenset()
    expected: frozenset[str] = frozenset()
    room: int = 0
    contributions: tuple[Contribution, ...] = ()
    deadline: float = math.inf
    missing: frozenset[str] = frozenset()
    short: int = 0

    @property
    def contributors(self) -> frozenset[str]:
        """The clients that have contributed, and so wait until this barrier closes."""
        return frozenset(each.client for each in self.contributions)

    @property
    def about_to_join(self) -> int:
        """The number of expected clients that can join now."""
        # Clients that run one after another are not all awaited: each joins when another leaves.
        return min(len(self.expected), max(0, self.room - len(self.present)))

    @property
    def num_awaited(self) -> int:
        """The number of clients of this barrier: contributed, at work, or about to join."""
        # A contributor that has left still counts, or the barrier would close without the others.
        return len(self.present | self.contributors) + self.about_to_join


def oldest(policy: PolicySpec) -> int:
    """Return the number of steps that a contribution may be behind."""
    if policy.kind == "sync" or (policy.kind == "quorum" and policy.late == "refuse"):
        return 0
    return policy.max_staleness


def advance(
    state: Barrier, event: Event, *, now: float, policy: PolicySpec
) -> tuple[Barrier, Decision]:
    """Apply one event.

    Args:
        state: The barrier before the event.
        event: The event.
        now: The time of the event, in seconds of any clock that does not run backwards.
        policy: The run's policy.

    Returns:
        The barrier after the event, and the decision.
    """
    match event:
        case Expected(clients=clients, at_once=at_once):
            # The other clients of earlier work keep their room; these get `at_once` in addition.
            others = replace(
                state, present=state.present - clients, expected=state.expected - clients
            )
            room = at_once + len(others.present) + others.about_to_join
            expected = (state.expected | clients) - state.present
            missing = state.missing - clients
            state = replace(state, expected=expected, room=room, missing=missing)
        case Joined(client=client):
            state = _with(state, client)
        case Left(client=client):
            state = _without(state, client)
        case Contributed(client=client, version=version, num_tokens=num_tokens):
            staleness = state.version - version
            # One contribution per client and barrier, as a second one would count twice in the sum.
            if client in state.contributors or staleness > oldest(policy):
                return state, Refuse(current=state.version)
            discount = policy.discount_of(staleness)
            added = Contribution(client=client, num_tokens=num_tokens, discount=discount)
            # The deadline counts from the first contribution: later ones do not extend it.
            deadline = min(state.deadline, now + policy.deadline_s)
            state = replace(
                _with(state, client), contributions=(*state.contributions, added), deadline=deadline
            )
    return _close_if_due(state, now, policy)


def _with(state: Barrier, client: str) -> Barrier:
    state = _without(state, client)
    return replace(state, present=state.present | {client})


def _without(state: Barrier, client: str) -> Barrier:
    left = {client}
    return replace(
        state,
        present=state.present - left,
        expected=state.expected - left,
        missing=state.missing - left,
    )


def _close_if_due(state: Barrier, now: float, policy: PolicySpec) -> tuple[Barrier, Decision]:
    enough = len(state.contributions) >= policy.quorum_of(state.num_awaited)
    if not state.contributions or not (enough or now >= state.deadline):
        return state, Wait()
    following = replace(state, version=state.version + 1, contributions=(), deadline=math.inf)
    # At the deadline, so that a client that has failed delays the others only once.
    if not enough:
        present = state.present & state.contributors
        # Without room for a further client, those that are expected were not awaited yet.
        awaited = state.present | (state.expected if state.about_to_join else frozenset())
        missing = state.missing | awaited - state.contributors
        following = replace(following, present=present, expected=frozenset(), missing=missing)
    following = replace(following, short=state.short + bool(following.missing))
    return following, _step(state.contributions, policy)


def _step(contributions: tuple[Contribution, ...], policy: PolicySpec) -> Step:
    weights = {each.client: each.num_tokens * each.discount for each in contributions}
    total = sum(weights.values())
    return Step(
        # Sorted, because the gradients are summed in this order and not in that of arrival.
        weights={client: weights[client] / total for client in sorted(weights)},
        # A single weight is always 1, so in `async` the discount cannot act through the weights.
        scale=contributions[0].discount if policy.kind == "async" else 1.0,
    )
