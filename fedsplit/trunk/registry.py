"""The registry of a trunk's clients: one token for each client."""

import secrets
import threading

from fedsplit.errors import Unauthenticated


class ClientRegistry:
    """The tokens of a trunk's clients; several threads may use it."""

    def __init__(self) -> None:
        self._clients: dict[str, str] = {}
        self._lock = threading.Lock()

    def admit(self, client: str) -> str:
        """Return the token of a client; the first call makes it."""
        with self._lock:
            # A client is admitted in every round, and the table must not grow with the rounds.
            known = {name: token for token, name in self._clients.items()}
            token = known.get(client) or secrets.token_urlsafe(24)
            self._clients[token] = client
            return token

    def forget(self, client: str) -> None:
        """Remove a client's token."""
        with self._lock:
            for token in [t for t, name in self._clients.items() if name == client]:
                del self._clients[token]

    def knows(self, token: str) -> bool:
        """Return whether a token belongs to a client."""
        return token in self._clients

    def client_of(self, token: str) -> str:
        """Return the client that a token belongs to.

        Raises:
            Unauthenticated: It belongs to no client.
        """
        # Without the lock: one lookup in a dict is atomic, and every request passes here.
        client = self._clients.get(token)
        if client is None:
            raise Unauthenticated(
                "the token is missing or not one of this run; use the one that the run's first "
                "message brought"
            )
        return client
