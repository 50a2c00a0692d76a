"""The link between a client and its trunk: one request out, one reply back.

`Link` is what the client's side is written against and `Service` what the trunk's side offers;
`LocalLink` joins the two in one process, still through the codec, so that what works over it
works over any other link.
"""

from abc import ABC, abstractmethod
from typing import Protocol

from fedsplit.wire.codec import through_codec
from fedsplit.wire.messages import R, Request


class Service(Protocol):
    """The trunk's side of every link."""

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

    @abstractmethod
    def close(self) -> None:
        """Let go of the connection; a second call does nothing."""


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
