"""A trunk that generates, over gRPC: in this process or, run as a script, in another."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from fedsplit.errors import Unauthenticated
from fedsplit.spec import WireSpec
from fedsplit.transport.server import GrpcServer
from fedsplit.trunk.service import TrunkService
from fedsplit.wire import messages as m
from tests.core.generating import Scene, scene

TOKEN = "the-token-that-outlives-a-restart"


class OneClient:
    """A service whose one client keeps its token when the server is started again."""

    def __init__(self, service: TrunkService, client: str) -> None:
        self._service = service
        self.trunks = service.trunks
        self._token = service.admit(client)

    def check_token(self, token: str) -> str:
        if token != TOKEN:
            raise Unauthenticated("the token is wrong")
        return ""

    def handle(self, request: m.Request[m.R], token: str) -> m.R:
        self.check_token(token)
        return self._service.handle(request, self._token)

    def disconnected(self, session: str) -> None:
        self._service.disconnected(session)


@contextmanager
def served(
    model_type: str, bind: str = "127.0.0.1:0", **budgets: Any
) -> Iterator[tuple[Scene, str]]:
    """A scene whose trunk is served to `alice`, and the address."""
    with scene(model_type, **budgets) as here:
        wire = replace(here.run.wire, bind=bind)
        service = OneClient(here.service, "alice")
        server = GrpcServer(service, wire=wire, limits=here.service.limits, max_clients=8)
        address = server.start()
        try:
            yield here, address
        finally:
            server.stop(grace_s=0.0)


def wire_spec() -> WireSpec:
    """What a client of these servers waits at most."""
    return WireSpec(budget_s=60.0, call_deadline_s=20.0)


def serve(model_type: str, bind: str) -> None:
    """Serve until killed; says its address."""
    with served(model_type, bind) as (_, where):
        print(where, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(*sys.argv[1:])
