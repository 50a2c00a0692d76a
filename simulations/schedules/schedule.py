"""A schedule: the clients, their steps, and the faults that happen to them; a seed makes one."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

NAMES = ("alice", "bob", "carol")
SPEAKERS = ("dora", "emil")
"""The clients that train, and those that generate."""

POLICIES = ("sync", "quorum", "async")
MESSAGES = ("open", "forward", "backward", "step", "close", "generate", "gradients", "state")
_SPOKEN = ("open", "generate", "generate", "close")
_TRAINED = ("open", "forward", "backward", "step", "close")
_READ = (*_TRAINED, "gradients", "gradients", "state", "state")
LINK_FAULTS = ("lose request", "lose reply", "repeat", "reorder", "delay")
"""What can happen to one message; see `fedsplit` links, which promise order but not arrival."""

TRUNK_FAULTS = ("crash trunk", "crash trunk after", "checkpoint")
CLIENT_FAULTS = ("crash", "gone", "freeze")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A fault: `what` happens, to which message or when.

    A fault of a link happens to message number `at` of this `kind` of this `client`. One of a
    client happens when it sends its message number `at` of any kind, and one of the trunk when
    request number `at` of all clients arrives.
    """

    what: str
    client: str = ""
    kind: str = ""
    at: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A schedule of faults.

    Attributes:
        seed: The source of delays and waits.
        policy: The policy of the trunk.
        steps: The steps of each client that trains.
        tokens: The tokens of each client that generates.
        late: The seconds after which the last client that trains comes.
        batches: The batches of a step.
        deltas: Whether hidden states are sent as deltas.
        tight: Whether the trunk's budgets hold one cache and one graph.
        faults: What happens.
    """

    seed: int
    policy: str
    steps: tuple[int, ...]
    tokens: tuple[int, ...] = ()
    late: float = 0.0
    batches: int = 1
    deltas: bool = False
    tight: bool = False
    faults: tuple[Fault, ...] = ()

    @property
    def trainers(self) -> tuple[str, ...]:
        """The names of the clients that train."""
        return NAMES[: len(self.steps)]

    @property
    def speakers(self) -> tuple[str, ...]:
        """The names of the clients that generate."""
        return SPEAKERS[: len(self.tokens)]

    @property
    def is_exact(self) -> bool:
        """Whether the weights at the end must be those of the run without faults.

        They depend on who takes part in which step, so they may differ if a client comes late,
        ends early or loses what it has done.
        """
        lost = {"crash", "gone"} & {fault.what for fault in self.faults}
        return self.policy == "sync" and not self.late and len(set(self.steps)) == 1 and not lost

    @property
    def reads_state(self) -> bool:
        """Whether clients that train read their gradients and the trunk's state in each step."""
        return self.seed % 5 == 0

    @property
    def frozen_s(self) -> float:
        """The seconds for which a client is frozen.

        A session that was never used ends after 3 s, and its client misses a step.
        """
        return 2.5 if self.is_exact else 5.0

    def __str__(self) -> str:
        faults = "".join(f"\n        {fault!r}," for fault in self.faults)
        rest = ", ".join(
            f"{name}={getattr(self, name)!r}" for name in self.__slots__ if name != "faults"
        )
        return f"Schedule(\n    {rest},\n    faults=({faults}\n    ),\n)"


def schedule_of(seed: int) -> Schedule:
    """Return the schedule with this seed."""
    rng = random.Random(f"schedule/{seed}")
    policy = rng.choice(("sync", "sync", "quorum", "async"))
    # Short, because what two faults can do to one another shows within a few messages of each.
    clients = (
        rng.choice((1, 2, 2, 2, 2, 2, 2, 3)) if policy == "sync" else rng.choice((2,) * 7 + (3,))
    )
    steps = rng.choice((1, 1, 1, 1, 2, 2, 3) if clients < 3 else (1, 1, 1, 2))
    others = [steps if rng.random() < 0.8 else rng.randint(1, 2) for _ in range(clients - 1)]
    generates = rng.random() < 0.2
    schedule = Schedule(
        seed=seed,
        policy=policy,
        steps=(steps, *others),
        tokens=tuple(rng.randint(1, 3) for _ in range(rng.choice((1, 1, 2)))) if generates else (),
        late=rng.choice((0.0, 0.0, 0.0, 0.0, 0.3)),
        batches=rng.choice((1, 1, 1, 1, 1, 2)),
        deltas=rng.random() < 0.1,
        tight=rng.random() < 0.15,
    )
    number = rng.choice((1, 2, 2, 3, 4))
    return replace(schedule, faults=tuple(_fault(rng, schedule) for _ in range(number)))


def _fault(rng: random.Random, schedule: Schedule) -> Fault:
    everyone = (*schedule.trainers, *schedule.speakers)
    kind = rng.random()
    if kind < 0.7:
        client = rng.choice(everyone)
        speaks = client in schedule.speakers
        kinds = _SPOKEN if speaks else _READ if schedule.reads_state else _TRAINED
        return Fault(
            what=rng.choice(LINK_FAULTS),
            client=client,
            kind=rng.choice(kinds),
            at=rng.choice((0, 0, 0, 1, 1, 2)),
        )
    if kind < 0.85:
        messages = sum(3 * steps + 2 for steps in schedule.steps) + 2 * sum(schedule.tokens)
        return Fault(what=rng.choice(TRUNK_FAULTS), at=rng.randrange(messages))
    client = rng.choice(everyone)
    what = rng.choice(("crash", "gone", "freeze", "freeze"))
    return Fault(what=what, client=client, at=rng.randrange(1, 10))


def shrunk(schedule: Schedule, fails: Callable[[Schedule], bool]) -> Schedule:
    """Return a smaller schedule that still fails: with fewer faults, clients, steps and tokens.

    Args:
        schedule: A schedule for which `fails` is true.
        fails: Whether a schedule fails.
    """
    while True:
        for smaller in _smaller(schedule):
            if fails(smaller):
                schedule = smaller
                break
        else:
            return schedule


def _smaller(schedule: Schedule) -> list[Schedule]:
    found = [
        replace(schedule, faults=schedule.faults[:place] + schedule.faults[place + 1 :])
        for place in range(len(schedule.faults))
    ]
    if schedule.tokens:
        found.append(replace(schedule, tokens=schedule.tokens[:-1]))
    if len(schedule.steps) > 1:
        found.append(replace(schedule, steps=schedule.steps[:-1]))
    most = max(schedule.steps)
    if most > 1:
        found.append(replace(schedule, steps=tuple(min(s, most - 1) for s in schedule.steps)))
    plain = (
        replace(schedule, late=0.0),
        replace(schedule, batches=1),
        replace(schedule, deltas=False),
        replace(schedule, tight=False),
    )
    return found + [smaller for smaller in plain if smaller != schedule]
