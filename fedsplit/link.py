"""The interfaces between a client and its trunk: `Link`, `Stream` and `Service`.

The client uses a `Link`, and the trunk offers a `Service`. `LocalLink` connects the two in one
process. Its requests and replies also pass through the codec, so that code that works over it
works over every link.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Protocol

from fedsplit.errors import ConnectionLost, FedsplitError
from fedsplit.telemetry.sinks import SILENT, Telemetry
from fedsplit.wire.codec import through_codec
from fedsplit.wire.messages import R, Request
from fedsplit.wire.replies import check_reply


class Service(Protocol):
    """The trunk's interface to every link."""

    @property
    def trunks(self) -> "Mapping[str, Future[None]]":
        """The trunks of this service by name, each with a future that is done when it ends.

        The future has a result after the trunk was stopped. It has an exception after the trunk
        failed; a failed trunk serves no more requests.
        """
        ...

    def check_token(self, token: str) -> str:
        """Check a caller's token before anything else of its call is read; must not block.

        Returns:
            The caller's name; empty if callers share a token, or need none.

        Raises:
            Unauthenticated: The token belongs to no client.
        """
        ...

    def handle(self, request: Request[R], token: str) -> R:
        """The reply to a request of the caller with `token`; blocks until the reply is ready.

        Raises:
            FedsplitError: The request is refused; it changed no state.
        """
        ...

    def disconnected(self, session: str) -> None:
        """Record that the connection of `session` was lost; the client may reconnect."""
        ...


class Link(ABC):
    """The client's connection to one trunk: it carries requests in order.

    Attributes:
        telemetry: Receives the spans of requests.
    """

    telemetry: Telemetry = SILENT

    @abstractmethod
    def exchange(self, request: Request[R]) -> R:
        """Send a request and wait for its reply.

        Raises:
            FedsplitError: The trunk refused the request, or the connection failed.
        """

    def stream(self) -> "Stream":
        """A stream for several outstanding requests; by default it sends one at a time."""
        return _OneByOne(self)

    @abstractmethod
    def close(self) -> None:
        """Close the connection; a second call does nothing."""


class Stream(ABC):
    """Carries requests in order, of which several may be outstanding.

    If a request is lost, all requests after it are lost too.
    """

    @abstractmethod
    def begin(self, request: Request[R]) -> Callable[[], R]:
        """Send a request.

        Returns:
            A function that waits for the reply and returns it; call it exactly once. It raises the
            errors of `Link.exchange`.
        """


class _OneByOne(Stream):
    def __init__(self, link: Link) -> None:
        self._link = link
        self._has_lost = False

    def begin(self, request: Request[R]) -> Callable[[], R]:
        # Errors appear where the reply is awaited, as with a stream over a network.
        reply: Future[R] = Future()
        try:
            if self._has_lost:
                raise ConnectionLost("a request before this one was lost; send it again")
            reply.set_result(self._link.exchange(request))
        except FedsplitError as failure:
            # A request that was refused is not lost, and those after it may still be served.
            self._has_lost = failure.retryable
            reply.set_exception(failure)
        return reply.result


class LocalLink(Link):
    """A link to a service in the same process.

    Args:
        service: The trunk.
        token: What a client would present over a network.
    """

    def __init__(self, service: Service, token: str = "") -> None:
        self._service = service
        self._token = token

    def exchange(self, request: Request[R]) -> R:
        """Call the service; request and reply pass through the codec, and the reply is checked."""
        reply = through_codec(self._service.handle(through_codec(request), self._token))
        check_reply(request, reply)
        return reply

    def close(self) -> None:
        """Do nothing, since there is no connection."""
