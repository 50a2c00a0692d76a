"""Ten bugs, planted in the service or in a client, that the checker must find.

Each is a small change of one class that a schedule is played with, so all else is real. A bug has a
schedule in which it does harm, and `finds` says which invariants it may violate.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedsplit.wire import messages as m
from fedsplit.wire.delta import DecodedForward, DeltaDecoder
from simulations.schedules.play import Cast
from simulations.schedules.schedule import Fault, Schedule
from simulations.schedules.server import RecordedService
from simulations.schedules.speaking import Speaker
from simulations.schedules.training import Trainer
from simulations.schedules.trunk import Array


class DoubleApply(RecordedService):
    """Each contribution is added twice."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        training, contribute = self.engine.training, self.engine.training.contribute

        def twice(call: Any, now: float) -> m.StepReply:
            for gradient in training.works._works[call.session].gradients.values():
                gradient.mul_(2.0)
            return contribute(call, now)

        training.contribute = twice  # type: ignore[method-assign]


class LostAcknowledgement(RecordedService):
    """The reply to a step is not kept for a client that asks again."""

    def handle(self, request: m.Request[m.R], token: str) -> m.R:
        """Answer a request; forget that of a step."""
        reply = super().handle(request, token)
        if isinstance(request, m.StepRequest):
            session = self._sessions.of(request.session, self.check_token(token))
            session.forget(m.StepRequest, request.call)
        return reply


class StaleAccepted(RecordedService):
    """A contribution of any age is accepted."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        training, contribute = self.engine.training, self.engine.training.contribute

        def as_new(call: Any, now: float) -> m.StepReply:
            training.works._works[call.session].barrier_version = training.barrier.version
            return contribute(call, now)

        training.contribute = as_new  # type: ignore[method-assign]


class WrongPosition(Speaker):
    """After a loss, the new session continues without the tokens before it."""

    def after_a_loss(self, history: list[Array]) -> int:
        """Forget all tokens but the last one."""
        del history[:-1]
        return 0


class VersionGoesBack(RecordedService):
    """A trunk that was started again gives itself out for the one before."""

    last = ""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        kind = type(self)
        self.server_instance_id = kind.last = kind.last or self.server_instance_id


class OthersReply(RecordedService):
    """The sessions of all clients share the replies that are kept."""

    def handle(self, request: m.Request[m.R], token: str) -> m.R:
        """Answer a request."""
        reply = super().handle(request, token)
        if isinstance(reply, m.OpenReply):
            opened = self._sessions.of(reply.session, self.check_token(token))
            self.shared = getattr(self, "shared", opened.replies)
            opened.replies = self.shared
        return reply


class DeadMember(RecordedService):
    """A client that has left stays at the barrier."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.engine.training.leave = _stays  # type: ignore[method-assign]


def _stays(client: str, now: float) -> None:
    """Leave nothing."""


class HalfAStep(RecordedService):
    """A checkpoint has some parameters from before its last step."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        training, state = self.engine.training, self.engine.training.state
        before: dict[str, Tensor] = state()

        def half() -> dict[str, Tensor]:
            return {**state(), "trunk/parameter/bias": before["trunk/parameter/bias"]}

        training.state = half  # type: ignore[method-assign]


class _TwiceDecoder(DeltaDecoder):
    """Adds the reference again to a forward that is repeated."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.seen: set[tuple[str, int]] = set()

    def decode(self, client: str, request: m.ForwardRequest) -> DecodedForward:
        """Decode a forward."""
        forward = super().decode(client, request)
        name = request.session, request.call
        if name in self.seen or forward.kept is None:
            delta_BTD = request.smashed_BTD
            again_BTD = 2 * forward.whole.smashed_BTD - delta_BTD
            whole = replace(forward.whole, smashed_BTD=again_BTD)
            return replace(forward, whole=whole)
        self.seen.add(name)
        return forward


class ResidualTwice(RecordedService):
    """The reference of a delta is added twice if its forward runs again."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.decoder = _TwiceDecoder(self._run.wire.history_bytes)


class OneSideGoesBack(Trainer):
    """A client goes on from its own state when the trunk has gone back."""

    def trunk_went_back(self, version: int) -> None:
        """Stay where it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """A bug: the classes that have it, a schedule in which it does harm, and what it violates."""

    cast: Callable[[], Cast]
    schedule: Schedule
    finds: str


_TWO = Schedule(seed=1, policy="sync", steps=(2, 2))
_RESTART = replace(_TWO, faults=(Fault(what="crash trunk", at=10),))

PLANTED: Mapping[str, Planted] = {
    "double apply": Planted(cast=lambda: Cast(service=DoubleApply), schedule=_TWO, finds="I1: "),
    "lost acknowledgement": Planted(
        cast=lambda: Cast(service=LostAcknowledgement),
        schedule=replace(_TWO, faults=(Fault(what="lose reply", client="bob", kind="step"),)),
        finds="I1: the acknowledgement of a step was lost",
    ),
    "stale accepted": Planted(
        cast=lambda: Cast(service=StaleAccepted),
        schedule=replace(
            _TWO,
            steps=(1, 2),
            faults=(Fault(what="freeze", client="bob", at=3),),
        ),
        finds="I3: ",
    ),
    "wrong position": Planted(
        cast=lambda: Cast(speaker=WrongPosition),
        schedule=replace(_RESTART, tokens=(3,)),
        finds="I5: ",
    ),
    "version going back": Planted(
        cast=lambda: Cast(service=type("_Fresh", (VersionGoesBack,), {})),
        schedule=_RESTART,
        finds="I2: ",
    ),
    "another client's reply": Planted(
        cast=lambda: Cast(service=OthersReply), schedule=_TWO, finds="I1: the reply to"
    ),
    "barrier with a dead member": Planted(
        cast=lambda: Cast(service=DeadMember),
        schedule=replace(_TWO, steps=(2, 1)),
        finds="I7: the barrier waits",
    ),
    "snapshot of half a step": Planted(
        cast=lambda: Cast(service=HalfAStep),
        schedule=replace(_TWO, faults=(Fault(what="checkpoint", at=10),)),
        finds="I6: ",
    ),
    "residual applied twice": Planted(
        cast=lambda: Cast(service=ResidualTwice),
        schedule=replace(
            _TWO,
            steps=(3,),
            late=0.1,
            deltas=True,
            faults=(Fault(what="freeze", client="alice", at=8),),
        ),
        finds="I1: the reply to alice is not the trunk's output",
    ),
    "rollback of one side only": Planted(
        cast=lambda: Cast(trainer=OneSideGoesBack), schedule=_RESTART, finds="I1: "
    ),
}
"""The planted bugs by name."""
