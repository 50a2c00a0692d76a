"""Which open stream carries which session; says when a session has lost its stream."""

import threading
from collections.abc import Callable

from fedsplit.errors import Overloaded

SESSIONS = 1024
"""How many sessions a stream carries at most."""


class Streams:
    """The open streams of a server, at most `limit` of them.

    A session belongs to the stream that last carried a request of it that was answered well: a
    stranger cannot claim it, and the end of a stream that was replaced already says nothing.

    The service may end a session by itself, of which a stream does not learn. So a stream carries
    at most `SESSIONS` of them; beyond that, it loses the one that it carried least recently.

    Args:
        limit: Streams at a time.
        lost: Called with the name of each session that lost its stream; must not block.
    """

    def __init__(self, limit: int, lost: Callable[[str], None]) -> None:
        self._limit = limit
        self._lost = lost
        self._lock = threading.Lock()
        self._sessions: dict[object, dict[str, None]] = {}  # of open streams, in order of their use
        self._carrier: dict[str, object] = {}

    def enter(self, stream: object) -> None:
        """Count a new stream.

        Raises:
            Overloaded: There are as many as may be.
        """
        with self._lock:
            if len(self._sessions) >= self._limit:
                raise Overloaded(
                    f"{self._limit} clients are connected, and no more are taken; try again later",
                    retry_after_s=1.0,
                )
            self._sessions[stream] = {}

    def carry(self, session: str, stream: object) -> None:
        """Note that `stream` carries `session`, and at once that it is lost if it has ended."""
        with self._lock:
            lost = self._carry(session, stream)
        if lost:
            self._lost(lost)

    def close(self, session: str) -> None:
        """Forget a session that has ended."""
        with self._lock:
            self._forget(session)

    def leave(self, stream: object) -> None:
        """Note the end of a stream; a second call does nothing."""
        with self._lock:
            lost = self._sessions.pop(stream, {})
            for session in lost:
                del self._carrier[session]
        for session in lost:
            self._lost(session)

    def _carry(self, session: str, stream: object) -> str:
        """The session that is lost by it; empty if none is."""
        if stream not in self._sessions:
            return "" if session in self._carrier else session
        self._forget(session)
        self._carrier[session] = stream
        carried = self._sessions[stream]
        carried[session] = None
        if len(carried) <= SESSIONS:
            return ""
        oldest = next(iter(carried))
        self._forget(oldest)
        return oldest

    def _forget(self, session: str) -> None:
        if session in self._carrier:
            del self._sessions[self._carrier.pop(session)][session]
