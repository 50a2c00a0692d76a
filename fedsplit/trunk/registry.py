"""Who may come to a trunk: one token for each client."""

import secrets
import threading

from fedsplit.errors import Unauthenticated


class ClientRegistry:
    """The tokens of a trunk's clients; may be asked by several threads."""

    def __init__(self) -> None:
        self._clients: dict[str, str] = {}
        self._lock = threading.Lock()

    def admit(self, client: str) -> str:
        """The token of a client, made when it is first asked for."""
        with self._lock:
            known = {name: token for token, name in self._clients.items()}
            token = known.get(client) or secrets.token_urlsafe(24)
            self._clients[token] = client
            return token

    def forget(self, client: str) -> None:
        """Take a client's token back."""
        with self._lock:
            for token in [t for t, name in self._clients.items() if name == client]:
                del self._clients[token]

    def client_of(self, token: str) -> str:
        """Whose token it is.

        Raises:
            Unauthenticated: It is nobody's.
        """
        client = self._clients.get(token)
        if client is None:
            raise Unauthenticated(
                "the token is missing or not one of this run; use the one that the run's first "
                "message brought"
            )
        return client
