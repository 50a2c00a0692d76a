"""The light clients of a schedule: they speak the real messages, and compute with a few numbers.

A client is a generator that yields a request to send or a time to wait, so that no client needs a
thread. Like `RemoteTrunk`, it repeats a request that was lost under the same identity.
"""

import random
from collections.abc import Generator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fedsplit.errors import FedsplitError, SessionLost
from fedsplit.spec import RunSpec
from fedsplit.wire import messages as m
from simulations.schedules.events import KINDS
from simulations.schedules.schedule import CLIENT_FAULTS
from simulations.schedules.server import answer_of
from simulations.schedules.trunk import Array
from simulations.schedules.world import World

Program = Generator[Any, Any, Any]

TOKENS = 2
"""The tokens of a batch, and of a prompt."""

AWAY_S = 1.0
"""The seconds after which a killed client is back."""

_LONGEST_WAIT_S = 1.0


@dataclass(slots=True)
class Saved:
    """What a client saves after a step, and needs to go back to the trunk's `version`.

    `instance` is the trunk's that it has seen last.
    """

    version: int
    step: int
    instance: str
    weight: Array
    references: dict[str, torch.Tensor]


@dataclass(slots=True, eq=False)
class Client:
    """A client: what it knows of the trunk, and how its calls end.

    `saved` survives a crash, and all other attributes do not.
    """

    name: str
    world: World
    run: RunSpec
    opening: dict[str, Any]
    instance: str = ""
    session: str = ""
    is_done: bool = False
    is_gone: bool = False
    is_invited: bool = False
    messages: int = 0
    saved: list[Saved] = field(default_factory=list)
    rng: random.Random = field(init=False)
    running: Program | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.world.schedule.seed}/{self.name}")

    @property
    def digest(self) -> str:
        """The digest of its weights; empty if it has none."""
        return ""

    def program(self) -> Program:
        """The work of the client, from the beginning or from where it is."""
        raise NotImplementedError

    # --- how its program runs -----------------------------------------------------------------

    def start(self) -> None:
        """Run the program, in place of one that runs."""
        self.is_done = False
        self.running = self._guarded()
        self._advance(self.running, None)

    def _guarded(self) -> Program:
        try:
            yield from self.program()
            self.note("finished", digest=self.digest)
        except FedsplitError as error:
            self.note("gave up", note=f"{error.code}: {error}")

    def _advance(self, program: Program, value: Any) -> None:
        if program is not self.running:
            return
        try:
            if isinstance(value, FedsplitError):
                wanted = program.throw(value)
            else:
                wanted = program.send(value)
        except StopIteration:
            self.is_done = True
            self.world.hang_up(self.name)
            # The trunk has gone back since this client opened its last session.
            if self.is_invited:
                self.start()
            else:
                self.world.leave(self.name)
            return
        if isinstance(wanted, m.Request):
            self._send(program, wanted)
        else:
            self.world.clock.after(wanted, partial(self._advance, program, None))

    def _send(self, program: Program, request: m.Request[Any]) -> None:
        number = self.messages
        self.messages += 1
        happens = {
            fault.what
            for fault in self.world.schedule.faults
            if fault.what in CLIENT_FAULTS and (fault.client, fault.at) == (self.name, number)
        }
        self.world.happened.update((fault, "") for fault in happens)
        is_answered = False

        def answer(reply: m.Reply | FedsplitError) -> None:
            nonlocal is_answered
            if not is_answered:
                is_answered = True
                self._advance(program, reply)

        send = partial(self.world.send, self.name, request, answer)
        if "crash" in happens or "gone" in happens:
            send()
            self._crash(program, is_gone="gone" in happens)
        elif "freeze" in happens:
            self.world.clock.after(self.world.schedule.frozen_s, send)
        else:
            send()

    def _crash(self, program: Program, *, is_gone: bool) -> None:
        self.note("was killed", note="it is gone" if is_gone else "")
        self.is_done = True
        # Here and not when it is collected, which may be in another thread.
        program.close()
        self.running = None
        self.session = ""
        self.instance = self.saved[-1].instance if self.saved else ""
        self.world.hang_up(self.name)
        self.is_gone = is_gone
        if is_gone:
            self.world.leave(self.name)
        else:
            self.is_done = False
            self.world.clock.after(AWAY_S, self.start)

    # --- calls --------------------------------------------------------------------------------

    def note(self, what: str, **fields: Any) -> None:
        """Record an event of this client."""
        self.world.log.add(self.name, what, client=self.name, **fields)

    def call(self, request: m.Request[Any]) -> Program:
        """Send a request until it is answered, as `fedsplit.client.rpc.Retry`; return the reply."""
        clock, tries = self.world.clock, 0
        began = clock.now
        name = {
            "kind": KINDS[type(request)],
            "session": getattr(request, "session", ""),
            "call": getattr(request, "call", -1),
        }
        self.note("asks", **name, data=request)
        while True:
            try:
                reply = yield request
            except FedsplitError as error:
                wait = error.retry_after_s or self.wait_s(tries)
                if not error.retryable or clock.now + wait - began > self.run.wire.budget_s:
                    self.note("got an error", **name, note=f"{error.code}: {error}", data=began)
                    raise
            else:
                self.note(
                    "got",
                    **name,
                    **answer_of(reply),
                    incarnation=self.instance,
                    data=(began, request, reply),
                )
                return reply
            yield wait
            tries += 1

    def wait_s(self, tries: int) -> float:
        """Return how long to wait before a further attempt."""
        return self.rng.uniform(0.0, min(_LONGEST_WAIT_S, 0.1 * 2**tries))

    def open(self, **purpose: Any) -> Program:
        """Open a session, and go back if the trunk has; return the reply."""
        reply: m.OpenReply = yield from self.call(
            m.OpenRequest(
                client=self.name,
                round=0,
                last_instance_id=self.instance,
                **self.opening,
                **purpose,
            )
        )
        self.session, self.is_invited = reply.session, False
        known, self.instance = self.instance, reply.server_instance_id
        if known and known != self.instance:
            self.trunk_went_back(reply.kept_version)
        return reply

    def trunk_went_back(self, version: int) -> None:
        """Go back to the trunk's version; a client without a state of its own has nothing to do."""

    def close(self) -> Program:
        """Close the session."""
        try:
            yield from self.call(m.CloseRequest(session=self.session))
        except SessionLost:  # an earlier attempt may have closed it
            pass
        self.session = ""
