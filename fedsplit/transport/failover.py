"""A client's link to one of several servers of a run; if it is lost, the next one takes over."""

import threading
from collections.abc import Callable, Sequence

from fedsplit.errors import ConnectionLost, TrunkGone
from fedsplit.link import Link, Stream
from fedsplit.transport.client import GrpcLink
from fedsplit.wire.messages import R, Request


class FailoverLink(Link):
    """Carries requests to the first server, and from the loss of its connection on to the next.

    A session does not move: at the next server it is unknown, and the client opens another one. But
    a step that was accepted before is answered there as well, because all servers have one leader.

    Args:
        links: The links to the servers, the client's own first. There is at least one.
    """

    def __init__(self, links: Sequence[GrpcLink]) -> None:
        self._links = list(links)
        self._place = 0
        self._gone: set[int] = set()
        self._lock = threading.Lock()

    @property
    def bytes_up(self) -> int:
        """The bytes of all frames that were sent."""
        return sum(link.bytes_up for link in self._links)

    @property
    def bytes_down(self) -> int:
        """The bytes of all frames that were received."""
        return sum(link.bytes_down for link in self._links)

    def exchange(self, request: Request[R]) -> R:
        """Send a request to the present server; see `Link`.

        Raises:
            ConnectionLost: The connection was lost; a repeated request goes to the next server.
            TrunkGone: No process listens at any of the servers' addresses, for long.
        """
        place = self._place
        return self.watched(place, lambda: self._links[place].exchange(request))

    def stream(self) -> Stream:
        """A stream to the present server; see `Link`."""
        place = self._place
        return _WatchedStream(self, place, self._links[place].stream())

    def close(self) -> None:
        """Close all connections."""
        for link in self._links:
            link.close()

    def watched(self, place: int, reply: Callable[[], R]) -> R:
        """Return what `reply` returns; leave the server at this place if its connection is lost.

        Raises:
            FedsplitError: That of `reply`, or as for `exchange`.
        """
        try:
            found = reply()
        except TrunkGone as gone:
            self._leave(place)
            self._gone.add(place)
            if len(self._gone) == len(self._links):
                raise
            raise ConnectionLost(f"{gone}; another server of the run takes over") from gone
        except ConnectionLost:
            self._leave(place)
            raise
        self._gone.clear()
        return found

    def _leave(self, place: int) -> None:
        with self._lock:
            # Several requests may fail with one connection.
            if self._place == place:
                self._place = (place + 1) % len(self._links)


class _WatchedStream(Stream):
    def __init__(self, link: FailoverLink, place: int, stream: Stream) -> None:
        self._link = link
        self._place = place
        self._stream = stream

    def begin(self, request: Request[R]) -> Callable[[], R]:
        reply = self._stream.begin(request)
        return lambda: self._link.watched(self._place, reply)
