"""Which open stream carries which session; says when a session has lost its stream."""

import threading
from collections.abc import Callable

from fedsplit.errors import Overloaded


class Streams:
    """The open streams of a server, at most `limit` of them.

    A session belongs to the stream that last carried a request of it that was answered well: a
    stranger cannot claim it, and the end of a stream that was replaced already says nothing.

    Args:
        limit: Streams at a time.
        lost: Told the name of each session whose stream ended; must not block.
    """

    def __init__(self, limit: int, lost: Callable[[str], None]) -> None:
        self._limit = limit
        self._lost = lost
        self._lock = threading.Lock()
        self._open: set[object] = set()
        self._carrier: dict[str, object] = {}

    def enter(self, stream: object) -> None:
        """Count a new stream.

        Raises:
            Overloaded: There are as many as may be.
        """
        with self._lock:
            if len(self._open) >= self._limit:
                raise Overloaded(
                    f"{self._limit} clients are connected, and no more are taken; try again later",
                    retry_after_s=1.0,
                )
            self._open.add(stream)

    def carry(self, session: str, stream: object) -> None:
        """Note that `stream` carries `session`, and at once that it is lost if it has ended."""
        with self._lock:
            late = stream not in self._open
            if not late:
                self._carrier[session] = stream
        if late and session not in self._carrier:
            self._lost(session)

    def close(self, session: str) -> None:
        """Forget a session that has ended."""
        with self._lock:
            self._carrier.pop(session, None)

    def leave(self, stream: object) -> None:
        """Note the end of a stream; a second call does nothing."""
        with self._lock:
            self._open.discard(stream)
            lost = [session for session, other in self._carrier.items() if other is stream]
            for session in lost:
                del self._carrier[session]
        for session in lost:
            self._lost(session)
