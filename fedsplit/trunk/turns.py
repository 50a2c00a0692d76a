"""Turns of several ranks: their engines run the same calls, in the order of rank 0.

The ranks of a trunk that is cut over several processes compute together, so each of them must run
every call, and in one order. Rank 0 has the clients: its scheduler decides what runs, and sends it
to the other ranks before it runs it. The engines of the others get their calls from this scheduler
in place of clients, and run the same code on them. So sessions' graphs, versions, barriers and
caches are the same at all ranks, and no rank is told of them.

A rank that decides by its own clock, or by a queue, would decide otherwise. So the time is that of
the turn, and rank 0 says whether a pass of generation begins, and how long the last one took.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from torch import Tensor

from fedsplit.errors import Draining, FedsplitError
from fedsplit.spec import RunSpec
from fedsplit.telemetry.events import StepTaken
from fedsplit.trunk.aggregator import Barrier
from fedsplit.trunk.call import Call
from fedsplit.trunk.scheduler import Scheduler
from fedsplit.trunk.virtual_time import VirtualTimeScheduler

RENEW = "renew"
"""The order after which all ranks begin with a new engine."""

_CLOSE = 1e-3
"""Norms that ranks have computed differ by less, relative to them."""


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """A change of an engine's state that no request asks for, by the name of what is done.

    `arguments` can be written as JSON. `state` has whole tensors by name; it is the last argument.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    state: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What all ranks must agree on: steps, their last norm, and refused calls."""

    steps: int = 0
    norm: float = 0.0
    refused: int = 0

    def is_like(self, other: "Outcome") -> bool:
        """Return whether both are the same, up to the rounding of the norm."""
        same = self.steps == other.steps and self.refused == other.refused
        return same and math.isclose(self.norm, other.norm, rel_tol=_CLOSE)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Turn:
    """One turn of the engine: its time in seconds, its calls, and the outcome of those before.

    `pass_s` is the time that the last pass of generation took, in seconds.
    """

    now: float
    pass_s: float
    calls: Sequence[Call]
    outcome: Outcome


Message = Turn | Order | bool | None
"""What rank 0 sends: a turn, an order between turns, whether a pass begins, or the end."""


class Channel(Protocol):
    """Carries messages from rank 0 to all others, in order."""

    @property
    def rank(self) -> int:
        """The rank of this process."""
        ...

    def send(self, message: Message) -> None:
        """Send a message to all other ranks."""
        ...

    def receive(self) -> Message:
        """Return the next message of rank 0."""
        ...

    def fail(self, reason: str) -> NoReturn:
        """End all ranks, because they no longer compute the same."""
        ...


class _RankScheduler(Scheduler):
    """A scheduler whose time stands still within a turn, so that all ranks have the same."""

    def __init__(self, wait_s: float, clock: Callable[[], float], channel: Channel) -> None:
        super().__init__(wait_s, clock)
        self._channel = channel
        self._turn_at = clock()
        self._outcome = Outcome()

    def turn_time(self) -> float:
        """Return the time of the turn at rank 0, in seconds."""
        return self._turn_at

    def stepped(self, step: StepTaken) -> None:
        """Count a step, which all ranks must have taken."""
        before = self._outcome
        self._outcome = Outcome(
            steps=before.steps + 1, norm=step.gradient_norm, refused=before.refused
        )

    def failed(self, failure: Exception) -> None:
        """Count a refused call; end all ranks if this one could not compute it."""
        if not isinstance(failure, FedsplitError):
            cause = " ".join(f"{type(failure).__name__}: {failure}".split())
            self._channel.fail(f"rank {self._channel.rank} failed ({cause})")
        before = self._outcome
        self._outcome = Outcome(steps=before.steps, norm=before.norm, refused=before.refused + 1)


class SendingScheduler(_RankScheduler):
    """The scheduler of rank 0, which sends its decisions to the other ranks."""

    def __init__(self, wait_s: float, clock: Callable[[], float], channel: Channel) -> None:
        super().__init__(wait_s, clock, channel)
        self._is_waiting = False

    @property
    def now(self) -> float:
        """Seconds of the clock that policies use; within a turn, the time of the turn."""
        return self._clock() if self._is_waiting else self._turn_at

    def next_batch(self, barrier: Barrier, patience_s: float) -> list[Call]:
        """Return the calls to run now, which the other ranks get as well."""
        self._is_waiting = True
        calls = super().next_batch(barrier, patience_s)
        self._is_waiting = False
        self._turn_at = self._clock()
        # What only concerns this rank's queue is a function, which the others cannot call.
        sent = [call for call in calls if not callable(call.request)]
        self._channel.send(
            Turn(now=self._turn_at, pass_s=self.pass_s, calls=sent, outcome=self._outcome)
        )
        return calls

    def has_arrivals(self, priority: int) -> bool:
        """Return whether an urgent call waits; the other ranks learn the answer."""
        found = super().has_arrivals(priority)
        self._channel.send(not found)
        return found

    def announce(self, order: Order) -> None:
        """Have the other ranks run an order that this one runs now, between its calls."""
        self._channel.send(order)


class ReplayingScheduler(_RankScheduler):
    """The scheduler of another rank, which gets its calls from rank 0.

    Attributes:
        run_order: Runs an order; set it before the first call.
        is_renewed: Whether a new engine replaces this one.
    """

    def __init__(self, wait_s: float, clock: Callable[[], float], channel: Channel) -> None:
        super().__init__(wait_s, clock, channel)
        self.run_order: Callable[[Order], Any] = lambda order: None
        self.is_renewed = False

    @property
    def now(self) -> float:
        """The time of the turn at rank 0, in seconds."""
        return self._turn_at

    def next_batch(self, barrier: Barrier, patience_s: float) -> list[Call]:
        """Return the calls of rank 0's next turn; none at the end."""
        turn = self._received()
        if not isinstance(turn, Turn):
            return []
        if not turn.outcome.is_like(self._outcome):
            self._channel.fail(
                f"rank {self._channel.rank} has computed {self._outcome}, but rank 0 "
                f"{turn.outcome}; all ranks need equal devices and versions of torch"
            )
        self._turn_at, self.pass_s = turn.now, turn.pass_s
        return list(turn.calls)

    def has_arrivals(self, priority: int) -> bool:
        """Return what rank 0 decided."""
        return self._received() is not True

    def admit(self, call: Call) -> None:
        """Ignore a call, which rank 0 sends when it runs."""

    def _received(self) -> Message:
        """Return the next message that is not an order, after orders before it have run."""
        while True:
            message = self._channel.receive()
            if message is None or (isinstance(message, Order) and message.name == RENEW):
                self.is_renewed = message is not None
                self.close(Draining("rank 0 has ended"))
                return None
            if not isinstance(message, Order):
                return message
            try:
                self.run_order(message)
            except FedsplitError as exc:
                self.failed(exc)


def scheduler_for(
    run: RunSpec,
    clock: Callable[[], float],
    is_excluded: Callable[[str], bool],
    channel: Channel | None,
) -> Scheduler:
    """Return the scheduler of an engine.

    Args:
        run: The run, which may simulate the speeds of machines.
        clock: Seconds that do not run backwards.
        is_excluded: Returns whether a client may not train now.
        channel: To the other ranks; None if there are none.
    """
    wait_s = run.train.max_queue_delay_s
    if channel:
        kind = ReplayingScheduler if channel.rank else SendingScheduler
        return kind(wait_s, clock, channel)
    if slowdown := run.policy.sim_slowdown:
        silence_s = run.wire.call_deadline_s
        return VirtualTimeScheduler(slowdown, silence_s, wait_s, clock, is_excluded)
    return Scheduler(wait_s, clock)
