"""The callers of a trunk: clients, by their tokens, and followers, which call for their clients."""

from collections.abc import Mapping
from typing import Any

from fedsplit.errors import Forbidden
from fedsplit.trunk.leader import Followers
from fedsplit.trunk.registry import ClientRegistry
from fedsplit.trunk.session_table import SessionTable
from fedsplit.trunk.sessions import Steps
from fedsplit.wire.messages import OpenRequest, Request
from fedsplit.wire.server_messages import OF_FOLLOWERS


class Callers:
    """Knows for which client a request is.

    Args:
        clients: The clients by their tokens.
        followers: The other servers of the run.
        sessions: The open sessions.
        last_steps: The remembered steps of ended sessions, by client.
    """

    def __init__(
        self,
        clients: ClientRegistry,
        followers: Followers,
        sessions: SessionTable,
        last_steps: Mapping[str, Steps],
    ) -> None:
        self._clients = clients
        self._followers = followers
        self._sessions = sessions
        self._last_steps = last_steps

    def are_followers(self, request: Request[Any], token: str) -> bool:
        """Return whether a follower sends this request.

        Raises:
            Forbidden: It is for followers only, and a client sends it.
        """
        is_follower = self._followers.is_one(token)
        if isinstance(request, OF_FOLLOWERS) and not is_follower:
            raise Forbidden(f"a {request.kind} is for the servers of the run, and not for clients")
        return is_follower

    def client_of(self, request: Request[Any], token: str, *, is_follower: bool) -> str:
        """Return the client that a request is for.

        Raises:
            Unauthenticated: The token, or the name that a follower has read, is not of this run.
            SessionLost: A follower names a session that is not open.
        """
        if not is_follower:
            return self._clients.client_of(token)
        if isinstance(request, OpenRequest):
            return self._clients.require(request.client)
        session: str = request.session  # type: ignore[attr-defined]
        for client, steps in tuple(self._last_steps.items()):
            if any(name == session for name, _ in steps):
                return client
        return self._sessions.client_of(session)
