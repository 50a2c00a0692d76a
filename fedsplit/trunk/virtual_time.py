"""Calls in the order of a virtual clock, for runs that simulate machines of different speed.

`VirtualTimeScheduler` is a conservative discrete-event simulation (Chandy and Misra 1979,
"Distributed Simulation: A Case Study in Design and Verification of Distributed Programs", IEEE TSE
SE-5(5)). A step of a client's machine takes a fixed virtual time, so the time of each client's next
event is known. An event runs once no other client can have an earlier one, however long that one
needs in real time. So the order of all events depends on the virtual times alone.

The events are the first FORWARD of a step, the STEP, and the LEAVE. Backwards and the further
forwards of a step change nothing for other clients and run at once.
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
    """A client's machine: when its next event is, and which calls it has made, in order."""

    at: float
    computing: bool = False
    calls: deque[Call] = field(default_factory=deque)


class VirtualTimeScheduler(Scheduler):
    """Runs calls in the order of (virtual time, client).

    A client's FORWARD is at the time of its STEP before, its STEP `slowdown` seconds after its
    FORWARD. A client that waits at a barrier goes on at the time at which that closes. A client
    that is expected begins at the time at which it was expected, and no other client runs ahead of
    it. Time stands still at the beginning, after `pause`, and when what `expect` named has come
    about.

    Args:
        slowdown: Virtual seconds of a step, by client; 1 for clients that are not named.
        silence_s: Real seconds after which a client that holds up time counts as dead.
        batch_wait_s: As in `Scheduler`.
        clock: As in `Scheduler`.
    """

    def __init__(
        self,
        slowdown: Mapping[str, float],
        silence_s: float,
        batch_wait_s: float,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(batch_wait_s, clock)
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
        """Seconds of the virtual clock."""
        return self._now

    @now.setter
    def now(self, now: float) -> None:
        self._now = now

    @property
    def num_waiting(self) -> int:
        """Calls that wait for a barrier, or for their time."""
        return sum(1 for _ in self._ordered())

    def next_batch(self, barrier: Barrier, patience_s: float) -> list[Call]:
        """As in `Scheduler`; after a long silence, the LEAVE of the client that holds up time."""
        batch = super().next_batch(barrier, patience_s)
        if batch or not self.num_waiting:
            self._heard_at = self._clock()
        elif self._clock() - self._heard_at > self._silence_s:
            self._heard_at = self._clock()
            if client := self.give_up(barrier.contributors):
                return [Call(kind=Kind.LEAVE, client=client)]
        return batch

    def expect(self, clients: Collection[str], *, close_after: int, until: float) -> None:
        """Let time go on: clients were sent work.

        It stands still again once `close_after` of the clients that were expected since the last
        `pause` have left, counted from now on and each once, and it does not pass `until`.
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
        """Take back the LEAVE calls of a client that has a session again."""
        calls = self._machine(client).calls
        leaving = [call for call in calls if call.kind is Kind.LEAVE]
        for call in leaving:
            calls.remove(call)
        return leaving

    def admit(self, call: Call) -> None:
        """Take a call in; a client's LEAVE goes before its other calls."""
        if call.kind not in ORDERED:
            super().admit(call)
            return
        if call.kind is Kind.LEAVE and call.client not in self._machines:
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
        """As in `Scheduler`, in the order of virtual time."""
        if self._unordered:
            return self._unordered.popleft()
        if self._stands_still:
            return None
        at, client = self._first(contributors)
        if self._until < min(at, deadline) < math.inf:
            self._now = max(self._now, self._until)
            return None
        if deadline < at:
            self._now = max(self._now, deadline)
            return Call(kind=Kind.TICK)
        if at == math.inf or not self._machines[client].calls:
            return None
        self._now = at
        return self._take(client)

    def withdraw(self, session: str) -> list[Call]:
        """As in `Scheduler`."""
        gone = super().withdraw(session)
        for calls in self._queues():
            for call in [call for call in calls if call.session == session]:
                calls.remove(call)
        return gone

    def give_up(self, contributors: Collection[str]) -> str | None:
        """Stop waiting for the client that holds up time, if there is one; its name."""
        at, client = self._first(contributors)
        if self._stands_still or at > self._until or not client or self._machines[client].calls:
            return None
        self._depart(client)
        return client

    def _deadline_in(self, barrier: Barrier) -> float:
        return math.inf  # it is a time of the virtual clock

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
        """The earliest next event of a client that does not wait at a barrier: (time, client)."""
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
            while machine.calls and machine.calls[0].kind is Kind.FORWARD:
                self._unordered.append(machine.calls.popleft())
        return call

    def _depart(self, client: str) -> None:
        for call in self._machines.pop(client).calls:  # of a client that goes on all the same
            self.admit(call)
        if client in self._members:
            self._members.remove(client)
            self._departures_left -= 1
            self._stands_still |= self._departures_left < 1
