"""A trunk without blocks: what goes up comes back. Run as a script it serves until killed."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch

from fedsplit.errors import Unauthenticated
from fedsplit.spec import WireSpec
from fedsplit.transport.client import GrpcLink
from fedsplit.transport.server import GrpcServer
from fedsplit.wire import messages as m
from fedsplit.wire import server_messages as s
from fedsplit.wire.validation import check_request

LIMITS = m.Limits(
    max_rows=8, max_tokens=1024, hidden_size=128, session_tokens=4096, stateless_bytes=1 << 20
)
TOKEN = "a-token"


class EchoService:
    """Echoes tensors. `refusal` is raised if set, and every reply waits while `gate` is closed."""

    def __init__(self, limits: m.Limits = LIMITS) -> None:
        self.limits = limits
        self.trunks: dict[str, Future[None]] = {}
        self.refusal: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.working = threading.Event()
        self.handled: list[m.Request[Any]] = []
        self._gone: list[str] = []
        self._changed = threading.Condition()

    def check_token(self, token: str) -> str:
        if token != TOKEN:
            raise Unauthenticated("the token is wrong")
        return ""

    def handle(self, request: Any, token: str) -> Any:
        self.check_token(token)
        check_request(request, self.limits)
        if self.refusal:
            raise self.refusal
        self.handled.append(request)
        self.working.set()
        self.gate.wait(30)
        return getattr(self, type(request).__name__)(request)

    def disconnected(self, session: str) -> None:
        with self._changed:
            self._gone.append(session)
            self._changed.notify_all()

    def gone(self, count: int) -> list[str]:
        """The sessions whose stream ended, once there are `count` of them."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._gone) >= count, timeout=10)
            return sorted(self._gone)

    def OpenRequest(self, request: m.OpenRequest) -> m.OpenReply:
        return m.OpenReply(
            session=request.client,
            server_instance_id="i1",
            version=3,
            limits=self.limits,
            autocast="float16",
        )

    def ForwardRequest(self, request: m.ForwardRequest) -> m.ForwardReply:
        return m.ForwardReply(trunk_out_BTD=request.smashed_BTD, version=request.call)

    def BackwardRequest(self, request: m.BackwardRequest) -> m.BackwardReply:
        grad = request.grad_trunk_out_BTD if request.want_grad else None
        return m.BackwardReply(grad_smashed_BTD=grad, trunk_sq_norm=0.5)

    def StepRequest(self, request: m.StepRequest) -> m.StepReply:
        return m.StepReply(version=request.step + 1)

    def ContributeRequest(self, request: s.ContributeRequest) -> m.StepReply:
        return m.StepReply(version=request.step + 1)

    def ParametersRequest(self, request: s.ParametersRequest) -> s.ParametersReply:
        return s.ParametersReply(
            server_instance_id="i1",
            version=3,
            barrier_version=3,
            names=("bias", "weight"),
            parameters=(torch.arange(3.0), torch.ones(700, 700)),
        )

    def WorkReportRequest(self, request: s.WorkReportRequest) -> s.WorkReportReply:
        return s.WorkReportReply()

    def CloseRequest(self, request: m.CloseRequest) -> m.CloseReply:
        return m.CloseReply()

    def GradientsRequest(self, request: m.GradientsRequest) -> m.GradientsReply:
        tensors = (torch.arange(3.0), torch.ones(700, 700)) if request.tensors else ()
        names = ("bias", "weight") if request.tensors else ()
        return m.GradientsReply(norms={"block.0": 2.0}, names=names, gradients=tensors)

    def TrainingStateRequest(self, request: m.TrainingStateRequest) -> m.TrainingStateReply:
        return m.TrainingStateReply(round=1, step=2, lr=0.5, version=3)

    def ServiceInfoRequest(self, request: m.ServiceInfoRequest) -> m.ServiceInfoReply:
        told = dict(server_instance_id="i1", model="f", family="echo", blocks="1-2", version=3)
        return m.ServiceInfoReply(
            protocol=1, sessions=0, limits=self.limits, served_model_names=(), **told
        )


@contextmanager
def serving(
    service: EchoService, wire: WireSpec | None = None, max_clients: int = 4
) -> Iterator[str]:
    """The address of a server of `service`, which is stopped at the end."""
    wire = wire or WireSpec()
    server = GrpcServer(service, wire=wire, limits=service.limits, max_clients=max_clients)
    address = server.start()
    try:
        yield address
    finally:
        service.gate.set()
        server.stop(grace_s=5.0)


@contextmanager
def linked(address: str, *, deadline_s: float = 20.0, **options: Any) -> Iterator[GrpcLink]:
    """A link to the address, which is closed at the end."""
    options = {"token": TOKEN, "wire": WireSpec(call_deadline_s=deadline_s), **options}
    link = GrpcLink(address, **options)
    try:
        yield link
    finally:
        link.close()


def forward(tokens: int = 4, call: int = 0, session: str = "s1") -> m.ForwardRequest:
    """A request of 512 bytes a token."""
    smashed_BTD = torch.arange(float(tokens * 128)).view(1, tokens, 128)
    return m.ForwardRequest(session=session, call=call, training=True, smashed_BTD=smashed_BTD)


if __name__ == "__main__":
    echo = EchoService()
    echo.gate.clear()
    with serving(echo) as where:
        print(where, flush=True)
        echo.working.wait()
        print("working", flush=True)
        threading.Event().wait()
