"""The scheduler that orders calls by a virtual clock, to simulate machines of different speed.

`VirtualTimeScheduler` is a conservative discrete-event simulation (Chandy and Misra 1979,
"Distributed Simulation: A Case Study in Design and Verification of Distributed Programs", IEEE TSE
SE-5(5)). A step of a client's machine takes a fixed virtual time, so the time of each client's next
event is known. An event runs as soon as no other client can have an earlier event. Real time has no
effect, so the order of all events depends on the virtual times alone.

The events are the first FORWARD of a step, the STEP, and the LEAVE. Backwards and the further
forwards of a step have no effect on other clients and run immediately.
"""

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from fedsplit.trunk.aggregator import Barrier
from fedsplit.trunk.call import ORDERED, Call, Kind
from fedsplit.trunk.scheduler import Scheduler


@dataclass(slots=True, kw_only=True)
class _Machine:
    """A client's machine: the time of its next event in virtual seconds, and its calls in order."""

    at: float
    computing: bool = False
    calls: deque[Call] = field(default_factory=deque)


class VirtualTimeScheduler(Scheduler):
    """Runs calls in the order of (virtual time, client).

    The time of a client's FORWARD is that of its previous STEP, and the time of its STEP is
    `slowdown` seconds after its FORWARD. A client that waits at a barrier continues at the time at
    which the barrier closes. An expected client begins at the time of `expect`, and no other client
    runs ahead of it. Time stands still at the beginning, after `pause`, and after the ends that
    `expect` names.

    An excluded client holds back no other one. Its calls run at once, which refuses them, and it
    does not count among those that have left.

    Args:
        slowdown: Virtual seconds of a step, by client; 1 for other clients.
        silence_s: Real seconds of silence after which a client that blocks time counts as dead.
        batch_wait_s: See `Scheduler`.
        clock: See `Scheduler`.
        is_excluded: Whether a client is excluded at present, such as by a quarantine.
    """

    def __init__(
        self,
        slowdown: Mapping[str, float],
        silence_s: float,
        batch_wait_s: float,
        clock: Callable[[], float],
        is_excluded: Callable[[str], bool],
    ) -> None:
        super().__init__(batch_wait_s, clock)
        self._is_excluded = is_excluded
        self._now = 0.0
        self._slowdown = slowdown
        self._silence_s = silence_s
        self._heard_at = clock()
        self._machines: dict[str, _Machine] = {}
        self._unordered: deque[Call] = deque()
        self._members: set[str] = set()
        self._stands_still = True
        self._departures_left = 0
        self._until = math.inf

    @property
    def now(self) -> float:
        """The time of the virtual clock, in seconds."""
        return self._now

    @now.setter
    def now(self, now: float) -> None:
        self._now = now

    @property
    def num_waiting(self) -> int:
        """The number of calls that wait for a barrier, or for their time."""
        return sum(1 for _ in self._ordered())

    def next_batch(self, barrier: Barrier, patience_s: float) -> list[Call]:
        """See `Scheduler`; after a long silence, return a LEAVE of the client that blocks time."""
        # A dead client makes no event, so without this all other clients would wait for it.
        batch = super().next_batch(barrier, patience_s)
        if batch or not self.num_waiting:
            self._heard_at = self._clock()
        elif self._clock() - self._heard_at > self._silence_s:
            self._heard_at = self._clock()
            if client := self.give_up(barrier.contributors):
                return [Call(kind=Kind.LEAVE, client=client)]
        return batch

    def expect(self, clients: Collection[str], *, close_after: int, until: float) -> None:
        """Let time advance, because work was sent to clients.

        Time stands still again as soon as `close_after` of the clients that were expected since the
        last `pause` have left after this call, each counted once. It does not pass `until`, in
        virtual seconds.
        """
        self._members |= set(clients)
        self._departures_left, self._until = close_after, until
        self._stands_still = close_after < 1
        for client in clients:
            self._machine(client)

    def pause(self) -> None:
        """Let time stand still."""
        self._members.clear()
        self._stands_still = True

    def join(self, client: str) -> list[Call]:
        """Remove and return the LEAVE calls of a client that has a session again."""
        calls = self._machine(client).calls
        leaving = [call for call in calls if call.kind is Kind.LEAVE]
        for call in leaving:
            calls.remove(call)
        return leaving

    def admit(self, call: Call) -> None:
        """Admit a call; a client's LEAVE is before its other calls."""
        if call.kind not in ORDERED:
            super().admit(call)
            return
        # Without a machine a client holds back no other one, so these need no order.
        needs_none = call.kind is Kind.LEAVE or self._is_excluded(call.client)
        if needs_none and call.client not in self._machines:
            self._unordered.append(call)
            return
        machine = self._machine(call.client)
        if call.kind is Kind.LEAVE:
            machine.calls.appendleft(call)
        elif call.kind is Kind.FORWARD and machine.computing and not machine.calls:
            self._unordered.append(call)
        else:
            machine.calls.append(call)

    def next_call(self, deadline: float, contributors: Collection[str]) -> Call | None:
        """See `Scheduler`; the order is that of virtual time."""
        for client in [each for each in self._machines if self._is_excluded(each)]:
            self._members.discard(client)
            self._remove(client)
        if self._unordered:
            return self._unordered.popleft()
        if self._stands_still:
            return None
        at, client = self._first(contributors)
        # Time goes up to `until` and not past it, so that a round ends at its virtual deadline.
        if self._until < min(at, deadline) < math.inf:
            self._now = max(self._now, self._until)
            return None
        if deadline < at:
            self._now = max(self._now, deadline)
            return Call(kind=Kind.TICK)
        # The earliest client has not made its call yet. A later one must not overtake it.
        if at == math.inf or not self._machines[client].calls:
            return None
        self._now = at
        return self._take(client)

    def withdraw(self, session: str) -> list[Call]:
        """See `Scheduler`."""
        withdrawn = super().withdraw(session)
        for calls in self._queues():
            for call in [call for call in calls if call.session == session]:
                calls.remove(call)
        return withdrawn

    def give_up(self, contributors: Collection[str]) -> str | None:
        """Stop waiting for the client that blocks time, if there is one; return its name."""
        at, client = self._first(contributors)
        if self._stands_still or at > self._until or not client or self._machines[client].calls:
            return None
        self._depart(client)
        return client

    def _deadline_in(self, barrier: Barrier) -> float:
        return math.inf  # the deadline is on the virtual clock, so no real time leads to it

    def _ordered(self) -> Iterator[Call]:
        for calls in self._queues():
            yield from calls

    def _forget_all(self) -> None:
        super()._forget_all()
        for calls in self._queues():
            calls.clear()

    def _queues(self) -> Iterator[deque[Call]]:
        yield self._unordered
        for machine in self._machines.values():
            yield machine.calls

    def _machine(self, client: str) -> _Machine:
        return self._machines.setdefault(client, _Machine(at=self._now))

    def _first(self, contributors: Collection[str]) -> tuple[float, str]:
        """Return the earliest event of a client that does not wait at a barrier: (time, client)."""
        # Events at the same time are ordered by the client's name, so a run can be repeated.
        events = [
            (max(self._now, machine.at), client)
            for client, machine in self._machines.items()
            if not (
                client in contributors and machine.calls and machine.calls[0].kind is Kind.FORWARD
            )
        ]
        return min(events, default=(math.inf, ""))

    def _take(self, client: str) -> Call:
        machine = self._machines[client]
        call = machine.calls.popleft()
        machine.at = self._now
        if call.kind is Kind.LEAVE:
            self._depart(client)
        elif call.kind is Kind.STEP:
            machine.computing = False
        else:
            machine.computing = True
            machine.at += self._slowdown.get(client, 1.0)
            # Further forwards of the step have arrived before the first one ran.
            while machine.calls and machine.calls[0].kind is Kind.FORWARD:
                self._unordered.append(machine.calls.popleft())
        return call

    def _depart(self, client: str) -> None:
        self._remove(client)
        if client in self._members:
            self._members.remove(client)
            self._departures_left -= 1
            self._stands_still |= self._departures_left < 1

    def _remove(self, client: str) -> None:
        # A client that counted as dead may still work. Its calls begin a new machine.
        for call in self._machines.pop(client).calls:
            self.admit(call)
