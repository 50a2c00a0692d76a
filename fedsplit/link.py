"""The link between a client and its trunk: one request out, one reply back.

`Link` is what the client's side is written against and `Service` what the trunk's side offers;
`LocalLink` joins the two in one process, still through the codec, so that what works over it
works over any other link.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Protocol

from fedsplit.errors import ConnectionLost, FedsplitError
from fedsplit.wire.codec import through_codec
from fedsplit.wire.messages import R, Request


class Service(Protocol):
    """The trunk's side of every link."""

    @property
    def trunks(self) -> "Mapping[str, Future[None]]":
        """The trunks here, by name, each with the future of its end.

        The future has a result once the trunk was stopped. A trunk that failed, and so can serve
        nothing more, leaves the exception that it failed with.
        """
        ...

    def check_token(self, token: str) -> None:
        """Let the holder of `token` in, before anything is read from it.

        Raises:
            Unauthenticated: It is nobody's token.
        """
        ...

    def handle(self, request: Request[R], token: str) -> R:
        """Answer a request of the caller who holds `token`; blocks until the reply is there.

        Raises:
            FedsplitError: The request is refused; nothing was changed.
        """
        ...

    def disconnected(self, session: str) -> None:
        """Note that the connection which carried `session` broke; it may come back."""
        ...


class Link(ABC):
    """The client's side: carries requests to one trunk, in order."""

    @abstractmethod
    def exchange(self, request: Request[R]) -> R:
        """Send a request and wait for its reply.

        Raises:
            FedsplitError: What the trunk answered, or what became of the connection.
        """

    def stream(self) -> "Stream":
        """For requests of which several are on their way; here each reply is waited for at once."""
        return _OneByOne(self)

    @abstractmethod
    def close(self) -> None:
        """Let go of the connection; a second call does nothing."""


class Stream(ABC):
    """Carries requests of which several may be on their way, in order.

    If one of them is lost, so are all that were, or are, begun after it.
    """

    @abstractmethod
    def begin(self, request: Request[R]) -> Callable[[], R]:
        """Send a request; what this returns waits for its reply, and must be called, once.

        It raises what `Link.exchange` would.
        """


class _OneByOne(Stream):
    def __init__(self, link: Link) -> None:
        self._link = link
        self._has_lost = False

    def begin(self, request: Request[R]) -> Callable[[], R]:
        reply: Future[R] = Future()
        try:
            if self._has_lost:
                raise ConnectionLost("a request before this one was lost; send it again")
            reply.set_result(self._link.exchange(request))
        except FedsplitError as failure:
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
        """Hand the request over; every tensor goes through the codec both ways."""
        return through_codec(self._service.handle(through_codec(request), self._token))

    def close(self) -> None:
        """Nothing is held."""
