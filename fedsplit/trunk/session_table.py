"""The open sessions of a trunk: their clients, when they expire, and which make room for others."""

import math
import threading
from collections import Counter
from collections.abc import Callable

from fedsplit.errors import Forbidden, Overloaded
from fedsplit.spec import RunSpec
from fedsplit.trunk.sessions import Session, no_session


class SessionTable:
    """The open sessions of a trunk, the least recently used first; several threads may use it.

    Args:
        run: The run; its `limits` bound the sessions of a client, and those of all clients.
        clock: Seconds that do not run backwards.
    """

    def __init__(self, run: RunSpec, clock: Callable[[], float]) -> None:
        self._run = run
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, name: str) -> bool:
        return name in self._open

    def has_client(self, client: str) -> bool:
        """Return whether a client has a session."""
        with self._lock:
            return any(each.info.client == client for each in self._open.values())

    def add(self, session: Session) -> list[Session]:
        """Add a session; return those to end: the one it replaces, and the one that makes room.

        The session that makes room is the least recently used one that generates: of this client
        if it has as many as it may have, else of the client that has most.

        Raises:
            Overloaded: None can make room, because those that train are not ended; or as many
                clients as the run has train already.
        """
        client = session.info.client
        with self._lock:
            replaced = [each for each in self._open.values() if each.info.is_like(session.info)]
            kept = [each for each in self._open.values() if each not in replaced]
            if session.info.training:
                self._require_room_to_train(client, kept)
            held = Counter(each.info.client for each in kept)
            evicted = []
            if held[client] >= self._run.limits.sessions_per_client:
                own = [each for each in kept if each.info.client == client]
                evicted = [_first_to_go(own, held, "limits.sessions_per_client")]
            elif len(kept) >= self._run.limits.sessions:
                held[client] += 1
                evicted = [_first_to_go(kept, held, "limits.sessions")]
            for each in evicted:
                del self._open[each.info.name]
            session.used_at = self._clock()
            session.expires_at = session.used_at + self._run.wire.stash_ttl_s
            self._open[session.info.name] = session
        return replaced + evicted

    def _require_room_to_train(self, client: str, sessions: list[Session]) -> None:
        # Each takes memory of the size of the trunk for its gradients.
        others = _training(sessions) - {client}
        if len(others) >= self._run.clients:
            raise Overloaded(
                f"{len(others)} other clients train here, and the run has clients="
                f"{self._run.clients}; try again when one has left, or raise clients at the trunk "
                "and at all clients"
            )

    def of(self, name: str, client: str) -> Session:
        """Return a session for a request of its client; it is then the most recently used.

        Raises:
            SessionLost: There is no such session.
            Forbidden: It belongs to another client.
        """
        with self._lock:
            session = self._open.get(name)
            if session is None:
                raise no_session(name)
            if session.info.client != client:
                raise Forbidden(f"session {name} belongs to another client")
            session.expires_at, session.used_at = math.inf, self._clock()
            self._open[name] = self._open.pop(name)
            return session

    def touch(self, name: str, client: str) -> None:
        """Count a use of a session by another one of its client; without one, do nothing."""
        with self._lock:
            session = self._open.get(name)
            if session and session.info.client == client:
                session.used_at = self._clock()
                self._open[name] = self._open.pop(name)

    def client_of(self, name: str) -> str:
        """Return the client of a session.

        Raises:
            SessionLost: There is no such session.
        """
        session = self._open.get(name)
        if session is None:
            raise no_session(name)
        return session.info.client

    def names(self) -> list[str]:
        """Return the names of all open sessions."""
        with self._lock:
            return list(self._open)

    def served(self, name: str) -> None:
        """Note a request of a session that was not refused: a connection carries the session."""
        if session := self._open.get(name):
            session.is_carried = True

    def refused(self, name: str) -> None:
        """Note a request of a session that was refused.

        A session that no connection carries expires then, as if the request had not come.
        """
        if (session := self._open.get(name)) and not session.is_carried:
            self.disconnected(name)

    def disconnected(self, name: str) -> None:
        """Let a session expire in `policy.deadline_s`, unless its client sends a request."""
        with self._lock:
            if (session := self._open.get(name)) and session.expires_at == math.inf:
                session.expires_at = self._clock() + self._run.policy.deadline_s
                session.is_carried = False

    def expired(self) -> list[Session]:
        """Return the sessions to end: disconnected ones, and idle ones that generate."""
        now = self._clock()
        idle = now - self._run.generation.ttl_s
        with self._lock:
            return [
                each
                for each in self._open.values()
                if not each.leaving
                and (each.expires_at <= now or (each.info.generating and each.used_at < idle))
            ]

    def in_use(self) -> dict[str, str]:
        """Return how much of each budget is in use, by the setting that limits it."""
        with self._lock:
            sessions = list(self._open.values())
        held = Counter(each.info.client for each in sessions)
        replies = [each.reply_bytes() for each in sessions]
        limits = self._run.limits
        return {
            "clients": f"{len(_training(sessions))} of {self._run.clients}",
            "limits.sessions": f"{len(sessions)} of {limits.sessions}",
            "limits.sessions_per_client": (
                f"{max(held.values(), default=0)} of {limits.sessions_per_client}"
            ),
            "replies": f"{sum(replies)} of {limits.sessions * limits.reply_bytes}",
            "limits.reply_bytes": f"{max(replies, default=0)} of {limits.reply_bytes}",
        }

    def remove(self, name: str) -> None:
        """Remove a session that has ended; a second call does nothing."""
        with self._lock:
            self._open.pop(name, None)


def _first_to_go(sessions: list[Session], held: Counter[str], limit: str) -> Session:
    """Return the first session that generates, of the client that holds most."""
    generating = [each for each in sessions if each.info.generating]
    if not generating:
        raise Overloaded(
            f"{len(sessions)} sessions are open, which is the most ({limit}); try again when one "
            "has ended, or raise the limit at the trunk",
        )
    # The first of several that are equal, which is the least recently used.
    return max(generating, key=lambda each: held[each.info.client])


def _training(sessions: list[Session]) -> set[str]:
    """Return the clients that have a session that trains."""
    return {each.info.client for each in sessions if each.info.training}
