"""A link over gRPC whose every message is lost, repeated or overtaken."""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fedsplit.errors import ConnectionLost, FedsplitError
from fedsplit.spec import WireSpec
from fedsplit.transport.client import GrpcLink
from fedsplit.wire.messages import OpenRequest, R, Request

_AT_ONCE_S = 0.001
"""How long a client waits before it sends again."""


class DisturbedLink(GrpcLink):
    """Carries requests with a fault for each of them; copies go over a connection of their own.

    Args:
        fault: The name of a function of `FAULTS`.
        address: The address of the trunk.
        token: The client's token.
        wire: The deadlines.

    Attributes:
        phases: The classes of the requests that had a fault.
    """

    def __init__(self, fault: str, address: str, *, token: str, wire: WireSpec) -> None:
        super().__init__(address, token=token, wire=wire)
        self.phases: set[str] = set()
        self._fault = FAULTS[fault]
        self._other = GrpcLink(address, token=token, wire=wire)
        self._last: list[Request[Any]] = []
        self._opened: OpenRequest | None = None

    def exchange(self, request: Request[R]) -> R:
        if isinstance(request, OpenRequest):
            # Only the first: a copy takes the place of the client's session, and each attempt to
            # open another one would be copied again.
            self._opened = self._opened or request
            if request is not self._opened:
                return self.send(request)
        self.phases.add(type(request).__name__)
        return self._fault(self, request)

    def close(self) -> None:
        self._other.close()
        super().close()

    def send(self, request: Request[R]) -> R:
        """Send a request without a fault."""
        return super().exchange(request)

    def send_copy(self, request: Request[Any]) -> None:
        """Send a copy over the other connection; its reply is for nobody."""
        with suppress(FedsplitError):
            self._other.exchange(request)

    def is_first(self, request: Request[Any]) -> bool:
        """Whether this is the first attempt at a request."""
        is_first = not any(each is request for each in self._last)
        self._last = [request]
        return is_first

    def swap(self, request: Request[Any]) -> list[Request[Any]]:
        """The request before this one, if there was one."""
        before, self._last = self._last, [request]
        return before


def _lost(link: DisturbedLink, request: Request[R]) -> R:
    if link.is_first(request):
        raise ConnectionLost("the request is lost", retry_after_s=_AT_ONCE_S)
    return link.send(request)


def _unanswered(link: DisturbedLink, request: Request[R]) -> R:
    reply = link.send(request)
    if link.is_first(request):
        raise ConnectionLost("the reply is lost", retry_after_s=_AT_ONCE_S)
    return reply


def _repeated(link: DisturbedLink, request: Request[R]) -> R:
    reply = link.send(request)
    link.send_copy(request)
    return reply


def _doubled(link: DisturbedLink, request: Request[R]) -> R:
    copy = threading.Thread(target=link.send_copy, args=(request,))
    copy.start()
    try:
        return link.send(request)
    finally:
        copy.join()


def _overtaken(link: DisturbedLink, request: Request[R]) -> R:
    reply = link.send(request)
    for before in link.swap(request):
        link.send_copy(before)
    return reply


FAULTS: dict[str, Callable[[DisturbedLink, Request[Any]], Any]] = {
    "the request is lost": _lost,
    "the reply is lost": _unanswered,
    "a copy comes after the reply": _repeated,
    "two copies come at once": _doubled,
    "a copy comes after the next request": _overtaken,
}
