"""Whose turn it is: requests as they come on the real clock, or in the order of a virtual one.

What moves the trunk on are the events of its training clients: the first FORWARD of a step, the
STEP, and to LEAVE. (Backwards and further forwards of a step change nothing for others.) Both
clocks are asked the same: `ask` hands a request in, `next` hands out the one that may run now.
Neither knows threads or tensors, and neither waits.

`VirtualTime` makes a run with machines of different speed reproducible. It is a conservative
discrete-event simulation (Chandy and Misra 1979, "Distributed Simulation: A Case Study in Design
and Verification of Distributed Programs", IEEE TSE SE-5(5)): the next event of every client is
known beforehand, for a step of its machine takes a fixed time, so an event runs once no other
client can have an earlier one, however long that one needs in real time.
"""

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Kind(Enum):
    """What a client can ask for that others may notice."""

    FORWARD = "forward"
    STEP = "step"
    LEAVE = "leave"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """A request of a client; `future` is what its sender waits for, `run` sees to it."""

    client: str
    session: str
    kind: Kind
    run: Callable[[], None]
    future: "Future[Any]" = field(default_factory=Future)


class Deadline:
    """It is the turn of the barrier: its deadline has come."""


class RealTime:
    """Requests run as they come, but a forward of who waits at a barrier.

    Args:
        clock: Seconds that do not run backwards.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._asked: list[Asked] = []

    @property
    def now(self) -> float:
        """Seconds of the clock."""
        return self._clock()

    def set(self, now: float) -> None:
        """Real time is what it is."""

    def patience(self, deadline: float) -> float:
        """Seconds until it is the deadline's turn."""
        return max(0.0, deadline - self.now)

    def expect(self, clients: Collection[str], *, close_after: int, until: float) -> None:
        """Real time does not stand still."""

    def close(self) -> None:
        """Real time does not stand still."""

    def join(self, client: str) -> list[Asked]:
        """A client has a session; nothing was withdrawn."""
        return []

    def ask(self, asked: Asked) -> None:
        """Hand a request in."""
        self._asked.append(asked)

    def next(self, deadline: float, waiting: Collection[str]) -> Asked | Deadline | None:
        """Hand out what may run now; `waiting` are the clients at a barrier."""
        if self.now >= deadline:
            return Deadline()
        for place, asked in enumerate(self._asked):
            if asked.kind is not Kind.FORWARD or asked.client not in waiting:
                return self._asked.pop(place)
        return None

    def withdraw(self, session: str) -> list[Asked]:
        """Take back what a session has asked for."""
        gone = [asked for asked in self._asked if asked.session == session]
        self._asked = [asked for asked in self._asked if asked.session != session]
        return gone

    def pending(self) -> list[Asked]:
        """What was handed in and not out."""
        return list(self._asked)

    def give_up(self, waiting: Collection[str]) -> str | None:
        """On this clock nobody holds up others; no one is given up."""
        return None


@dataclass(slots=True, kw_only=True)
class _Machine:
    """A client's machine: when its next event is, and what it has asked for, in order."""

    at: float
    computing: bool = False
    asked: deque[Asked] = field(default_factory=deque)


class VirtualTime:
    """Requests run in the order of (virtual time, client).

    A client's FORWARD is at the time of its STEP before, its STEP `slowdown` seconds after its
    FORWARD. Who waits at a barrier goes on at the time at which that closes. A client that is
    expected begins at the time at which it was expected, and nobody runs ahead of it. Time stands
    still at the beginning, after `close`, and when what `expect` was told has come about.

    Args:
        slowdown: Seconds that a step takes, by client; 1 for those that are not named.
    """

    def __init__(self, slowdown: Mapping[str, float]) -> None:
        self.now = 0.0
        self._slowdown = slowdown
        self._machines: dict[str, _Machine] = {}
        self._at_once: deque[Asked] = deque()
        self._members: set[str] = set()
        self._stands_still = True
        self._departures_left = 0
        self._until = math.inf

    def set(self, now: float) -> None:
        """Go on at another time."""
        self.now = now

    def patience(self, deadline: float) -> float:
        """Real seconds mean nothing to a virtual deadline."""
        return math.inf

    def expect(self, clients: Collection[str], *, close_after: int, until: float) -> None:
        """Have time go on: clients were sent work.

        It stands still again once `close_after` of the clients that were expected since the last
        `close` have left, counted from now on and each once, and it does not pass `until`.
        """
        self._members |= set(clients)
        self._departures_left, self._until = close_after, until
        self._stands_still = close_after < 1
        for client in clients:
            self._machine(client)

    def close(self) -> None:
        """Have time stand still."""
        self._members.clear()
        self._stands_still = True

    def join(self, client: str) -> list[Asked]:
        """A client has a session; if it was about to leave, that is withdrawn and returned."""
        asked = self._machine(client).asked
        leaving = [each for each in asked if each.kind is Kind.LEAVE]
        for each in leaving:
            asked.remove(each)
        return leaving

    def ask(self, asked: Asked) -> None:
        """Hand a request in; the end of a client goes before what else it asked for."""
        if asked.kind is Kind.LEAVE and asked.client not in self._machines:
            self._at_once.append(asked)
            return
        machine = self._machine(asked.client)
        if asked.kind is Kind.LEAVE:
            machine.asked.appendleft(asked)
        elif asked.kind is Kind.FORWARD and machine.computing and not machine.asked:
            self._at_once.append(asked)
        else:
            machine.asked.append(asked)

    def next(self, deadline: float, waiting: Collection[str]) -> Asked | Deadline | None:
        """Hand out what may run now; `waiting` are the clients at a barrier."""
        if self._at_once:
            return self._at_once.popleft()
        if self._stands_still:
            return None
        at, client = self._first(waiting)
        if self._until < min(at, deadline) < math.inf:
            self.now = max(self.now, self._until)
            return None
        if deadline < at:
            self.now = max(self.now, deadline)
            return Deadline()
        if at == math.inf or not self._machines[client].asked:
            return None
        self.now = at
        return self._take(client)

    def withdraw(self, session: str) -> list[Asked]:
        """Take back what a session has asked for."""
        gone = [asked for asked in self.pending() if asked.session == session]
        for queue in self._queues():
            for asked in [asked for asked in queue if asked.session == session]:
                queue.remove(asked)
        return gone

    def pending(self) -> list[Asked]:
        """What was handed in and not out."""
        return [asked for queue in self._queues() for asked in queue]

    def give_up(self, waiting: Collection[str]) -> str | None:
        """Wait no longer for the client that holds time up, if one does; its name."""
        at, client = self._first(waiting)
        if self._stands_still or at > self._until or not client or self._machines[client].asked:
            return None
        self._depart(client)
        return client

    def _queues(self) -> Iterable[deque[Asked]]:
        return (self._at_once, *(machine.asked for machine in self._machines.values()))

    def _machine(self, client: str) -> _Machine:
        return self._machines.setdefault(client, _Machine(at=self.now))

    def _first(self, waiting: Collection[str]) -> tuple[float, str]:
        """The next event of those that do not wait at a barrier: its time, and whose it is."""
        events = [
            (max(self.now, machine.at), client)
            for client, machine in self._machines.items()
            if not (client in waiting and machine.asked and machine.asked[0].kind is Kind.FORWARD)
        ]
        return min(events, default=(math.inf, ""))

    def _take(self, client: str) -> Asked:
        machine = self._machines[client]
        asked = machine.asked.popleft()
        machine.at = self.now
        if asked.kind is Kind.LEAVE:
            self._depart(client)
        elif asked.kind is Kind.STEP:
            machine.computing = False
        else:
            machine.computing = True
            machine.at += self._slowdown.get(client, 1.0)
            while machine.asked and machine.asked[0].kind is Kind.FORWARD:
                self._at_once.append(machine.asked.popleft())
        return asked

    def _depart(self, client: str) -> None:
        for asked in self._machines.pop(client).asked:  # of one that goes on all the same
            self.ask(asked)
        if client in self._members:
            self._members.remove(client)
            self._departures_left -= 1
            self._stands_still |= self._departures_left < 1
