"""When the trunk steps, and with which weights: pure decisions, no torch, no threads, no clock.

`sync` is one step per barrier over the clients that are in the round and connected. A barrier
waits for those; from its first contribution on it waits at most `deadline_s`, then it steps with
what is there and no longer waits for the missing ones until they show up again.
"""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundOpened:
    """A round begins: no step before `expected` clients have joined (or the deadline)."""

    expected: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A client has a training session."""

    client: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """A client's session ended; what it contributed stays."""

    client: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Contributed:
    """A client's gradient, made with parameter version `version`, that weighs `num_tokens`."""

    client: str
    version: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked:
    """Time has passed."""


Event = RoundOpened | Joined | Left | Contributed | Ticked


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Nothing to do yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """The contribution is stale, or its client's second: the trunk is at version `current`."""

    current: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Step now with these clients' gradients; the weights sum to one."""

    weights: dict[str, float]


Decision = Wait | Refuse | Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Barrier:
    """The state of the aggregator.

    `awaited` clients hold a barrier up, `tokens` are the contributions so far, `gate` is how many
    clients have yet to join before the first step, and `deadline` when waiting ends (seconds).
    """

    version: int = 0
    awaited: frozenset[str] = frozenset()
    tokens: tuple[tuple[str, int], ...] = ()
    gate: int = 0
    deadline: float = math.inf

    def has(self, client: str) -> bool:
        """Whether the client has contributed to this barrier, and so waits for its end."""
        return any(name == client for name, _ in self.tokens)


def sync(
    state: Barrier, event: Event, *, now: float, deadline_s: float
) -> tuple[Barrier, Decision]:
    """Take one event in.

    Args:
        state: The barrier before the event.
        event: What happened.
        now: The time of the event, in seconds of any clock that does not run backwards.
        deadline_s: How long a barrier waits after its first contribution.

    Returns:
        The barrier after the event, and what to do.
    """
    match event:
        case RoundOpened(expected=expected):
            state = replace(state, gate=max(0, expected - len(state.awaited)))
        case Joined(client=client) if client not in state.awaited:
            state = _awaiting(state, client)
        case Left(client=client):
            state = replace(state, awaited=state.awaited - {client})
        case Contributed(client=client, version=version) if version != state.version or state.has(
            client
        ):
            return state, Refuse(current=state.version)
        case Contributed(client=client, num_tokens=num_tokens):
            state = _awaiting(state, client) if client not in state.awaited else state
            state = replace(
                state,
                tokens=(*state.tokens, (client, num_tokens)),
                deadline=min(state.deadline, now + deadline_s),
            )
    return _decide(state, now)


def _awaiting(state: Barrier, client: str) -> Barrier:
    return replace(state, awaited=state.awaited | {client}, gate=max(0, state.gate - 1))


def _decide(state: Barrier, now: float) -> tuple[Barrier, Decision]:
    given = {client for client, _ in state.tokens}
    complete = state.gate == 0 and state.awaited <= given
    if not given or not (complete or now >= state.deadline):
        return state, Wait()
    total = sum(tokens for _, tokens in state.tokens)
    weights = {client: tokens / total for client, tokens in sorted(state.tokens)}
    following = Barrier(version=state.version + 1, awaited=state.awaited & frozenset(given))
    return following, Step(weights=weights)
