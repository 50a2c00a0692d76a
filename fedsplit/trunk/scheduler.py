"""The scheduler: decides which call the engine runs next, and which calls run as one pass.

`Scheduler` runs calls as they arrive, except that a forward waits while its client waits at the
barrier. The scheduler for simulated machine speeds is in `fedsplit.trunk.virtual_time`.
"""

import itertools
import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fedsplit.errors import FedsplitError
from fedsplit.telemetry.events import StepTaken
from fedsplit.trunk.aggregator import Barrier
from fedsplit.trunk.call import ORDERED, Call, Kind


class _Arrival(NamedTuple):
    # The fields are compared in this order. `order` is unique, so calls are never compared.
    priority: int
    order: int
    call: Call


@dataclass(slots=True, kw_only=True, eq=False)
class _Batch:
    due: float
    calls: list[Call] = field(default_factory=list)


class Scheduler:
    """Queues calls of all threads for the engine's thread.

    Any thread may call `submit`; only the engine's thread may call the other methods.

    Args:
        batch_wait_s: The longest time that a prepared call waits for others of its pass, in
            seconds.
        clock: Seconds that do not run backwards.

    Attributes:
        closed: The reason that `close` was called with; None while the scheduler is open.
        pass_s: The seconds of the last pass of generation, which the engine sets.
    """

    def __init__(self, batch_wait_s: float, clock: Callable[[], float]) -> None:
        self.closed: FedsplitError | None = None
        self.pass_s = 0.0
        self._batch_wait_s = batch_wait_s
        self._clock = clock
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._arrivals: queue.PriorityQueue[_Arrival] = queue.PriorityQueue()
        self._immediate: deque[Call] = deque()
        self._waiting: list[Call] = []
        self._batches: dict[Hashable, _Batch] = {}

    def submit(self, call: Call) -> "Future[Any]":
        """Queue a call and return its future.

        Raises:
            FedsplitError: The reason that the scheduler was closed with.
        """
        call.submitted_at = self._clock()
        # The lock makes check and put one operation: a call after `close` would never be answered.
        with self._lock:
            if self.closed:
                raise self.closed
            self._arrivals.put(_Arrival(call.kind.priority, next(self._numbers), call))
        return call.future

    def next_batch(self, barrier: Barrier, patience_s: float) -> list[Call]:
        """Return the calls to run now; none if none becomes due within `patience_s` seconds."""
        while not (batch := self._ready(barrier)):
            try:
                patience = min(patience_s, self._due_in(barrier))
                arrival = self._arrivals.get(timeout=patience)
            except queue.Empty:
                return self._ready(barrier)
            self.admit(arrival.call)
        return batch

    def has_arrivals(self, priority: int) -> bool:
        """Return whether a call of this priority or a more urgent one waits in the queue."""
        # PriorityQueue cannot return its first item without removing it, so this reads its list.
        with self._arrivals.mutex:
            return bool(self._arrivals.queue) and self._arrivals.queue[0].priority <= priority

    def gather(self, call: Call, size: int) -> list[Call]:
        """Hold a prepared call until there are `size` calls of its key, at least 2.

        Returns:
            The calls of the pass, in their order, or nothing while others are awaited.
            `next_batch` returns a batch that has waited for too long, with fewer calls.
        """
        due = self._clock() + self._batch_wait_s
        batch = self._batches.setdefault(call.batch_key, _Batch(due=due))
        batch.calls.append(call)
        return self._pop_batch(call.batch_key) if len(batch.calls) >= size else []

    def withdraw(self, session: str) -> list[Call]:
        """Remove and return the calls of a session that were admitted and have not run."""
        withdrawn = [call for call in self._admitted() if call.session == session]
        self._immediate = deque(call for call in self._immediate if call.session != session)
        self._waiting = [call for call in self._waiting if call.session != session]
        for batch in self._batches.values():
            batch.calls = [call for call in batch.calls if call.session != session]
        self._batches = {key: batch for key, batch in self._batches.items() if batch.calls}
        return withdrawn

    def close(self, reason: FedsplitError) -> None:
        """Fail every call that has not run, and refuse new ones; the first reason counts."""
        with self._lock:
            self.closed = self.closed or reason
        unfinished = list(self._admitted())
        while not self._arrivals.empty():
            unfinished.append(self._arrivals.get().call)
        for call in unfinished:
            call.future.set_exception(self.closed)
        self._forget_all()

    # --- several ranks, which see `fedsplit.trunk.turns` --------------------------------------

    def turn_time(self) -> float:
        """Return the seconds of the clock that the state of training and generation uses."""
        return self._clock()

    def announce(self, order: Any) -> None:
        """Note an order that the engine runs now, between its calls."""

    def stepped(self, step: StepTaken) -> None:
        """Note a step that was taken."""

    def failed(self, failure: Exception) -> None:
        """Note a call that has failed."""

    # --- the order of calls, which a subclass may change --------------------------------------

    @property
    def now(self) -> float:
        """Seconds of the clock that policies use."""
        return self._clock()

    @property
    def num_waiting(self) -> int:
        """The number of calls that wait for a barrier, or for their time."""
        return len(self._waiting)

    def admit(self, call: Call) -> None:
        """Admit a call from the queue."""
        (self._waiting if call.kind in ORDERED else self._immediate).append(call)

    def next_call(self, deadline: float, contributors: Collection[str]) -> Call | None:
        """Remove and return an ordered call that may run now, or a TICK at the deadline."""
        if self.now >= deadline:
            return Call(kind=Kind.TICK)
        for place, call in enumerate(self._waiting):
            if call.kind is not Kind.FORWARD or call.client not in contributors:
                return self._waiting.pop(place)
        return None

    def expect(self, clients: Collection[str], *, close_after: int, until: float) -> None:
        """Note that work was sent to clients; see `VirtualTimeScheduler`."""

    def pause(self) -> None:
        """Note that a round is over; see `VirtualTimeScheduler`."""

    def join(self, client: str) -> list[Call]:
        """Note that a client has a session; return its LEAVE calls that are withdrawn."""
        return []

    def _deadline_in(self, barrier: Barrier) -> float:
        """Return the seconds until the barrier's deadline."""
        return barrier.deadline - self.now

    def _ordered(self) -> Iterator[Call]:
        """Yield the ordered calls that were admitted and have not run."""
        yield from self._waiting

    def _forget_all(self) -> None:
        self._immediate.clear()
        self._waiting.clear()
        self._batches.clear()

    # --- batches ------------------------------------------------------------------------------

    def _ready(self, barrier: Barrier) -> list[Call]:
        if self._immediate:
            return [self._immediate.popleft()]
        if call := self.next_call(barrier.deadline, barrier.contributors):
            return [call]
        # Last, so that calls that are admitted already can still join a batch.
        now = self._clock()
        due = [key for key, batch in self._batches.items() if batch.due <= now]
        return self._pop_batch(due[0]) if due else []

    def _due_in(self, barrier: Barrier) -> float:
        first = min((batch.due for batch in self._batches.values()), default=math.inf)
        return max(0.0, min(first - self._clock(), self._deadline_in(barrier)))

    def _pop_batch(self, key: Hashable) -> list[Call]:
        # In a fixed order, because the order of rows decides the order of sums.
        return sorted(self._batches.pop(key).calls, key=lambda call: call.batch_order)

    def _admitted(self) -> Iterator[Call]:
        yield from self._immediate
        yield from self._ordered()
        for batch in self._batches.values():
            yield from batch.calls
