"""The world of a schedule: virtual time, the trunk's incarnations, the network and its faults.

Nothing here knows real time. Messages take a fixed time, and events at the same time happen in the
order in which they were planned.
"""

import heapq
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from torch import Tensor

from fedsplit.errors import ConnectionLost, FedsplitError
from fedsplit.spec import RunSpec
from fedsplit.transport.streams import Streams
from fedsplit.trunk.sessions import AcceptedStep
from fedsplit.wire import messages as m
from fedsplit.wire.codec import through_codec
from fedsplit.wire.replies import check_reply
from simulations.schedules.events import KINDS, TRUNK, Log, digest_of
from simulations.schedules.schedule import LINK_FAULTS, Fault, Schedule
from simulations.schedules.server import RecordedService
from simulations.schedules.trunk import FIRST, PlainTrunk
from simulations.schedules.turns import Turns

LATENCY_S = 0.01
NOTICED_S = 0.2
"""The time after which a client notices that a request or its reply was lost."""

RESTART_S = 0.5
_HELD = 2
"""The number of messages that overtake one that is reordered."""

Answer = Callable[[m.Reply | FedsplitError], None]


class Clock:
    """Virtual seconds, and what is planned for later."""

    def __init__(self) -> None:
        self.now = 0.0
        self._numbers = itertools.count()
        self._planned: list[tuple[float, int, Callable[[], None]]] = []

    def __call__(self) -> float:
        """Return the time."""
        return self.now

    def after(self, seconds: float, work: Callable[[], None]) -> None:
        """Plan something."""
        heapq.heappush(self._planned, (self.now + seconds, next(self._numbers), work))

    def next(self) -> bool:
        """Do what is planned first; return False if there is nothing."""
        if not self._planned:
            return False
        self.now, _, work = heapq.heappop(self._planned)
        work()
        return True


class World:
    """A trunk that may be killed, and the network between it and its clients.

    Args:
        schedule: What happens.
        run: The run of all.
        kind: The service of the trunk.
        trunk: The trunk; it gets its first parameters.
        turns: Runs the calls of the service.
    """

    def __init__(
        self,
        schedule: Schedule,
        run: RunSpec,
        *,
        kind: type[RecordedService],
        trunk: PlainTrunk,
        turns: Turns,
    ) -> None:
        self.schedule = schedule
        self.run = run
        self.clock = Clock()
        self.log = Log(self.clock)
        self.happened: Counter[tuple[str, str]] = Counter()
        self.on_restart: Callable[[], None] = lambda: None
        self._kind = kind
        self._turns = turns
        self._trunk = trunk
        self._sent: Counter[tuple[str, str]] = Counter()
        self._requests = 0
        self._deadlines: set[float] = set()
        self._stream: dict[str, object] = {}
        self._held: dict[str, list[tuple[int, Callable[[], None]]]] = {}
        self._faults: dict[Any, list[Fault]] = {}
        for fault in schedule.faults:
            where = (fault.client, fault.kind) if fault.what in LINK_FAULTS else TRUNK
            self._faults.setdefault((where, fault.at), []).append(fault)
        self._trunk.set_values(FIRST)
        self._is_save_due = False
        self._past: dict[str, int] = {}
        self._steps: dict[str, AcceptedStep] = {}
        self.saved: dict[str, Tensor] = {}
        self.service = self._started()
        self._save()

    # --- the trunk ----------------------------------------------------------------------------

    @property
    def is_up(self) -> bool:
        """Whether the trunk runs."""
        return not self.service.is_killed

    def _save(self) -> None:
        """Save the state of the trunk, and the last step of each client, as a server does."""
        engine = self.service.engine
        self._is_save_due = False
        self.saved, self._steps = engine.training.state(), dict(engine.last_steps)
        self.log.add(
            TRUNK,
            "saved",
            incarnation=self.service.server_instance_id,
            version=int(self.saved["trunk/version"]),
            data={
                name.rpartition("/")[2]: tensor.numpy()
                for name, tensor in self.saved.items()
                if "/parameter/" in name
            },
        )

    def _at_rest(self) -> None:
        if self._is_save_due:
            self._save()

    def kill(self) -> None:
        """Kill the trunk; another one begins from the last checkpoint after some time."""
        if not self.is_up:
            return
        killed = self.service
        killed.is_killed = True
        self.log.add(TRUNK, "was killed", incarnation=killed.server_instance_id)
        waiting, killed.parked = killed.parked, []
        for each in waiting:
            assert each.task
            self._turns.resume(each.task)
        self.clock.after(RESTART_S, self._restart)

    def _restart(self) -> None:
        self._trunk.set_values(FIRST)
        self.service = self._started()
        self.on_restart()

    def _started(self) -> RecordedService:
        service = self._kind(self._trunk, self.run, self.clock, log=self.log, turns=self._turns)
        service.engine.at_rest = self._at_rest
        if self.saved:
            service.engine.training.load_state(self.saved)
            service.resume(self._steps)
            # As `fedsplit.serve.trunk_states`: up to which version the steps of each are kept.
            version = service.engine.version
            self._past = {each: min(kept, version) for each, kept in self._past.items()}
            service.past_instances = dict(self._past)
        self._past[service.server_instance_id] = sys.maxsize
        self._streams, self._stream = Streams(service.disconnected), {}
        self.log.add(
            TRUNK,
            "started",
            incarnation=service.server_instance_id,
            version=service.engine.version,
            digest=digest_of(self._trunk.values()),
        )
        return service

    def settle(self) -> None:
        """Let the trunk do what is due, and return the replies that are ready."""
        service, now = self.service, self.clock.now
        ready = [each for each in service.parked if each.future.done() or now >= each.until]
        for each in ready:
            service.parked.remove(each)
            assert each.task
            self._turns.resume(each.task)
        if ready:
            self.settle()
        self._plan_deadlines(service)

    def _plan_deadlines(self, service: RecordedService) -> None:
        """Let the trunk run when its barrier or a call that waits has its deadline."""
        self._plan(service.engine.training.barrier.deadline)
        for each in service.parked:
            self._plan(each.until)

    def _plan(self, time: float) -> None:
        if time < math.inf and time not in self._deadlines:
            self._deadlines.add(time)
            self.clock.after(max(0.0, time - self.clock.now), self._pump)

    def _pump(self) -> None:
        if self.is_up:
            # The first time, a session that has expired is only found.
            for _ in range(2):
                self.service.pump()

    def expect(self, clients: Collection[str]) -> None:
        """Let the trunk's steps wait for clients that are about to come."""
        self.log.add(TRUNK, "expects", note=", ".join(clients), data=tuple(clients))
        self.service.expect(tuple(clients), round=0, at_once=len(clients), close_after=1)

    def leave(self, client: str) -> None:
        """Tell the trunk that a client has ended or is gone, as the federation's messages would."""
        self.flush(client)
        if self.is_up:
            self.service.release(client)
            self.log.add(TRUNK, "released", client=client)

    def end(self) -> None:
        """Let all that the clients have left behind expire, and record what the trunk holds."""
        service, engine = self.service, self.service.engine
        self.clock.now += 2.0 * self.run.policy.deadline_s + self.run.generation.ttl_s
        self._pump()
        held = {
            "sessions": service.num_sessions,
            "bytes of graphs": engine.stashed_bytes,
            "bytes of caches": engine.cache_bytes,
            "calls that wait": engine.num_waiting + len(service.parked),
            "contributions that wait": len(engine.training.barrier.contributions),
            "clients that cannot be forgotten": sum(
                not service.forget(client)
                for client in (*self.schedule.trainers, *self.schedule.speakers)
            ),
        }
        self.log.add(
            TRUNK,
            "ended",
            incarnation=service.server_instance_id,
            version=engine.version,
            digest=digest_of(self._trunk.values()),
            data=held,
        )

    # --- the network --------------------------------------------------------------------------

    def send(self, client: str, request: m.Request[Any], answer: Answer) -> None:
        """Carry a request to the trunk and its reply back; either may be lost."""
        kind = KINDS[type(request)]
        number = self._sent[client, kind]
        self._sent[client, kind] += 1
        faults = {fault.what for fault in self._faults.get(((client, kind), number), ())}
        self.happened.update((fault, kind) for fault in faults)
        stream = self._stream_of(client)
        deliver = partial(self._deliver, client, request, stream)
        lost = partial(answer, ConnectionLost("the connection was lost; try again"))
        self._let_go(client)
        if {"lose request", "lose reply", "delay"} & faults:
            self.clock.after(NOTICED_S, partial(self._noticed, client, stream, lost))
        if "lose request" in faults:
            return
        if "delay" in faults:
            self.clock.after(1.5 * NOTICED_S, partial(deliver, _ignore))
            return
        self.clock.after(LATENCY_S, partial(deliver, _ignore if "lose reply" in faults else answer))
        if "repeat" in faults:
            self.clock.after(LATENCY_S, partial(deliver, answer))
        if "reorder" in faults:
            held = partial(self.clock.after, LATENCY_S, partial(deliver, _ignore))
            self._held.setdefault(client, []).append((self._count(client) + _HELD, held))

    def flush(self, client: str) -> None:
        """Deliver what the network still holds of a client that sends no more."""
        for _, work in self._held.pop(client, []):
            work()

    def _count(self, client: str) -> int:
        return sum(number for (each, _), number in self._sent.items() if each == client)

    def _let_go(self, client: str) -> None:
        if client not in self._held:
            return
        count, held = self._count(client), self._held[client]
        self._held[client] = [each for each in held if each[0] >= count]
        for place, work in held:
            if place < count:
                work()

    def hang_up(self, client: str) -> None:
        """End the connection of a client that was killed, after what it has sent."""
        if stream := self._stream.pop(client, None):
            self.clock.after(LATENCY_S, partial(self._leave, stream))

    def _stream_of(self, client: str) -> object:
        if client not in self._stream:
            self._stream[client] = object()
            self._streams.enter(self._stream[client])
        return self._stream[client]

    def _noticed(self, client: str, stream: object, lost: Callable[[], None]) -> None:
        if self._stream.get(client) is stream:
            del self._stream[client]
        self._leave(stream)
        lost()

    def _leave(self, stream: object) -> None:
        self._streams.leave(stream)
        self._plan(self.clock.now + self.run.policy.deadline_s)

    def _deliver(
        self, client: str, request: m.Request[Any], stream: object, answer: Answer
    ) -> None:
        number = self._requests
        self._requests += 1
        what = {fault.what for fault in self._faults.get((TRUNK, number), ())}
        self.happened.update((fault, "") for fault in what)
        self._is_save_due |= "checkpoint" in what
        if "crash trunk" in what:
            self.kill()
        if not self.is_up:
            lost = ConnectionLost("no trunk answers at the address")
            self.clock.after(NOTICED_S, partial(answer, lost))
            return
        service = self.service

        def reply_to(reply: m.Reply | FedsplitError) -> None:
            if service.is_killed:
                reply = ConnectionLost("the connection was lost; try again")
            self.clock.after(LATENCY_S, partial(answer, reply))

        self._handle(service, client, request, stream, reply_to)
        if "crash trunk after" in what:
            self.kill()

    def _handle(
        self,
        service: RecordedService,
        client: str,
        request: m.Request[Any],
        stream: object,
        answer: Answer,
    ) -> None:
        token, streams = service.admit(client), self._streams

        def work() -> None:
            try:
                reply = through_codec(service.handle(through_codec(request), token))
                check_reply(request, reply)
            except FedsplitError as error:
                answer(error)
                return
            # As `fedsplit.transport.calls` does it.
            if isinstance(request, m.CloseRequest):
                streams.close(request.session)
            elif session := getattr(request, "session", ""):
                streams.carry(session, stream)
            answer(reply)

        # A thread is needed only by a call that waits.
        if not service.may_wait(request):
            work()
            return
        task = self._turns.begin(work)
        if not task.is_done:
            service.parked[-1].task = task


def _ignore(_: m.Reply | FedsplitError) -> None:
    """Take a reply that its client does not get."""
