"""The open streams of a server and their sessions; reports sessions that lost their stream."""

import threading
from collections.abc import Callable

SESSIONS = 1024
"""The most sessions of one stream."""


class Streams:
    """The open streams of a server.

    A session belongs to the stream of its last successful request. So another client cannot claim
    it, and the end of a stream that was replaced before does not end the session.

    The service may end a session without a request, and streams are not notified. So a stream has
    at most `SESSIONS` sessions; beyond that, its least recently used one is reported as lost.

    Args:
        lost: Called with the name of each session that lost its stream; must not block.
    """

    def __init__(self, lost: Callable[[str], None]) -> None:
        self._lost = lost
        self._lock = threading.Lock()
        # Of each open stream, the least recently used session first.
        self._sessions: dict[object, dict[str, None]] = {}
        self._carrier: dict[str, object] = {}

    def enter(self, stream: object) -> None:
        """Add a new stream."""
        with self._lock:
            self._sessions[stream] = {}

    def carry(self, session: str, stream: object) -> None:
        """Note that `stream` carries `session`; report the session if the stream has ended."""
        with self._lock:
            lost = self._carry(session, stream)
        # Outside of the lock, since the service has locks of its own.
        if lost:
            self._lost(lost)

    def close(self, session: str) -> None:
        """Remove a session that has ended."""
        with self._lock:
            self._forget(session)

    def leave(self, stream: object) -> None:
        """Remove a stream and report its sessions; a second call does nothing."""
        with self._lock:
            lost = self._sessions.pop(stream, {})
            for session in lost:
                del self._carrier[session]
        for session in lost:
            self._lost(session)

    def _carry(self, session: str, stream: object) -> str:
        """The session that is lost by this; empty if none is."""
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
