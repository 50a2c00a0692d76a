"""The trunk's side of a schedule: the real service without its thread, in incarnations.

The service's engine has no thread of its own here: whoever calls the service lets the engine run
until nothing is left to do. A call that waits for others parks. A killed trunk is one that is not
called any more; the next one begins from the last checkpoint.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from fedsplit.errors import ConnectionLost, DeadlineExceeded, FedsplitError
from fedsplit.model.stage import TrunkPart
from fedsplit.spec import RunSpec
from fedsplit.trunk.service import TrunkService
from fedsplit.trunk.update import TrunkStep, TrunkUpdate
from fedsplit.wire import messages as m
from simulations.schedules.events import KINDS, TRUNK, Log, digest_of
from simulations.schedules.trunk import PlainTrunk, Values
from simulations.schedules.turns import Task, Turns


@dataclass(slots=True, eq=False)
class Parked:
    """A call of the service that waits for its future, at most until a time."""

    task: Task | None
    future: "Future[Any]"
    until: float


class RecordedService(TrunkService):
    """A service that is driven by its callers, and records what it does.

    Args:
        trunk: The trunk part.
        run: The run.
        clock: The virtual time.
        log: Gets the events.
        turns: Runs the calls.
    """

    def __init__(
        self,
        trunk: PlainTrunk,
        run: RunSpec,
        clock: Callable[[], float],
        *,
        log: Log,
        turns: Turns,
    ) -> None:
        self.log = log
        self.trunk = trunk
        self.parked: list[Parked] = []
        self.is_killed = False
        self._turns = turns
        self._clock = clock
        self._may_wait = False
        self._seconds = run.wire.call_deadline_s
        super().__init__(cast(TrunkPart, trunk), run, clock, update=self._recording_update())

    def _recording_update(self) -> type[TrunkUpdate]:
        service = self

        class Recording(TrunkUpdate):
            """The update of the run, which records each step."""

            def combine(self, contributions: Any, weights: Any) -> Any:
                # Before: the combination may change the gradients in place.
                self.taken = [
                    (each.client, each.step, weights[each.client], _arrays(each.gradients))
                    for each in contributions
                ]
                return super().combine(contributions, weights)

            def after_step(self, step: TrunkStep) -> None:
                super().after_step(step)
                service.record_step(self.taken)

        return Recording

    def record_step(self, taken: list[tuple[str, int, float, Values]]) -> None:
        """Record a step of the trunk's parameters."""
        values = self.trunk.values()
        self.log.add(
            TRUNK,
            "applied",
            incarnation=self.server_instance_id,
            digest=digest_of(values),
            note="gradients of "
            + ", ".join(f"{client} {digest_of(values)}" for client, _, _, values in taken),
            data=(taken, self.engine.now),
        )

    def may_wait(self, request: m.Request[Any]) -> bool:
        """Return whether a request may wait for other clients: a forward after a step."""
        return isinstance(request, m.ForwardRequest) and bool(
            self.engine.training.barrier.contributions
        )

    def handle(self, request: m.Request[m.R], token: str) -> m.R:
        """Answer one request, and record the request and what became of it."""
        self._may_wait = self.may_wait(request)
        name = named(request, self.check_token(token), self.server_instance_id)
        self.log.add(TRUNK, "was asked", **name, data=request)
        try:
            reply = super().handle(request, token)
        except FedsplitError as error:
            self.log.add(TRUNK, "refused", **name, note=f"{error.code}: {error}")
            raise
        self.log.add(TRUNK, "answered", **name, **answer_of(reply), data=(request, reply))
        return reply

    def pump(self) -> None:
        """Let the engine do all that is due now."""
        probe = self.engine.run(_nothing, late=True)
        while not probe.done():
            self.engine.step()

    def _wait(self, future: "Future[Any]") -> Any:
        # Without a call that waits, the engine has something to do until the future is done.
        while not (self._may_wait or future.done()):
            self.engine.step()
        if self._may_wait or self.engine.num_waiting:
            self.pump()
        if not future.done():
            waiting = Parked(None, future, self._clock() + self._seconds)
            self.parked.append(waiting)
            self._turns.park()
        if self.is_killed:
            raise ConnectionLost("the trunk was killed")
        if not future.done():
            raise DeadlineExceeded(f"the trunk did not answer within {self._seconds} s")
        return future.result()


def named(request: m.Request[Any], client: str, incarnation: str) -> dict[str, Any]:
    """Return the fields of an event that name a request."""
    return {
        "client": client,
        "kind": KINDS[type(request)],
        "session": getattr(request, "session", ""),
        "call": getattr(request, "call", -1),
        "incarnation": incarnation,
    }


def answer_of(reply: m.Reply) -> dict[str, Any]:
    """Return the fields of an event that describe a reply."""
    fields: dict[str, Any] = {"version": getattr(reply, "version", -1)}
    for name in ("trunk_out_BTD", "grad_smashed_BTD"):
        if (tensor := getattr(reply, name, None)) is not None:
            fields["digest"] = digest_of(tensor.numpy())
    return fields


def _arrays(gradients: Mapping[str, Tensor]) -> Values:
    return {name: each.numpy().copy() for name, each in gradients.items()}


def _nothing() -> None:
    """Do nothing."""
