"""A trunk that works as it should, and then answers what it likes, for tests that attack clients.

`HostileService` takes the place of a service on any link; `hostile_server` serves it over gRPC.
Extend them where an attack needs more.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fedsplit.link import Service
from fedsplit.spec import WireSpec
from fedsplit.transport.server import GrpcServer
from fedsplit.wire import messages as m

Alter = Callable[[m.Request[Any], m.Reply], m.Reply]


class HostileService:
    """A service that changes the replies of another one.

    Args:
        service: Handles the requests.
        alter: Returns what is sent in place of its reply to a request, or raises an error to send.

    Attributes:
        handled: The requests, in their order.
    """

    def __init__(self, service: Service, alter: Alter) -> None:
        self._service = service
        self._alter = alter
        self.trunks = service.trunks
        self.check_token = service.check_token
        self.disconnected = service.disconnected
        self.handled: list[m.Request[Any]] = []

    def handle(self, request: m.Request[Any], token: str) -> Any:
        """Handle a request, and change the reply."""
        self.handled.append(request)
        return self._alter(request, self._service.handle(request, token))


def to(kind: type[m.Reply], **changes: Any) -> Alter:
    """Change fields of the replies of one kind; a function is given the field's value."""

    def alter(_: m.Request[Any], reply: m.Reply) -> Any:
        if not isinstance(reply, kind):
            return reply
        values = {
            name: change(getattr(reply, name)) if callable(change) else change
            for name, change in changes.items()
        }
        return replace(reply, **values)  # type: ignore[type-var]  # every reply is a dataclass

    return alter


@contextmanager
def hostile_server(service: Service, alter: Alter, limits: m.Limits) -> Iterator[str]:
    """Serve over gRPC; yields the address."""
    wire = WireSpec(bind="127.0.0.1:0")
    server = GrpcServer(HostileService(service, alter), wire=wire, limits=limits, max_clients=2)
    address = server.start()
    try:
        yield address
    finally:
        server.stop(grace_s=0.0)
