"""The callers of a trunk: clients, by their tokens, and followers, which call for their clients."""

from collections.abc import Mapping
from typing import Any

from fedsplit.errors import Forbidden
from fedsplit.trunk.leader import Followers
from fedsplit.trunk.registry import ClientRegistry, unauthenticated
from fedsplit.trunk.session_table import SessionTable
from fedsplit.trunk.sessions import Steps
from fedsplit.wire.messages import OpenRequest, Request
from fedsplit.wire.server_messages import ParametersRequest


class Callers:
    """Knows for which client a follower sends a request.

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

    def client_of(self, request: Request[Any], token: str) -> str:
        """Return the client for which a follower sends a request; empty if it is for none.

        Raises:
            Unauthenticated: The token is not that of the servers, or the client not of this run.
            SessionLost: The session is not open.
        """
        if not self._followers.is_one(token):
            raise unauthenticated()
        if isinstance(request, ParametersRequest):
            return ""
        if isinstance(request, OpenRequest):
            return self._clients.require(request.client)
        session: str = request.session  # type: ignore[attr-defined]
        for client, steps in tuple(self._last_steps.items()):
            if any(name == session for name, _ in steps):
                return client
        return self._sessions.client_of(session)


def require_own(request: OpenRequest, client: str) -> None:
    """Refuse to open a session in the name of another client than that of the token.

    Raises:
        Forbidden: The request names another one.
    """
    if request.client != client:
        raise Forbidden(f"the token belongs to {client!r}, not to {request.client!r}")


def not_for_clients(request: Request[Any]) -> Forbidden:
    """Return the error for a client's request that is for followers only."""
    return Forbidden(f"a {request.kind} is for the servers of the run, and not for clients")
