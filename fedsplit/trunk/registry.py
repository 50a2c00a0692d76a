"""The registry of a trunk's clients: one token for each client."""

import hmac
import secrets
import threading

from fedsplit.errors import Unauthenticated


def token_of(client: str, key: str) -> str:
    """Return the token of a client, which nobody can make without the key."""
    return f"{client}.{hmac.digest(key.encode(), client.encode(), 'sha256').hex()}"


class ClientRegistry:
    """The tokens of a trunk's clients; several threads may use it.

    Args:
        key: The secret that the tokens are made with, which the servers of a run share; empty for a
            random one.
    """

    def __init__(self, key: str = "") -> None:
        self.key = key or secrets.token_hex(24)
        self._clients: dict[str, str] = {}
        self._lock = threading.Lock()

    def admit(self, client: str) -> str:
        """Return the token of a client."""
        token = token_of(client, self.key)
        with self._lock:
            self._clients[token] = client
        return token

    def forget(self, client: str) -> None:
        """Remove a client's token."""
        with self._lock:
            self._clients.pop(token_of(client, self.key), None)

    def knows(self, token: str) -> bool:
        """Return whether a token belongs to a client."""
        return bool(self.find(token))

    def require(self, client: str) -> str:
        """Return a client's name, which another server of the run has read from its token.

        Raises:
            Unauthenticated: The client is not of this run, or not any more.
        """
        return self.client_of(token_of(client, self.key))

    def client_of(self, token: str) -> str:
        """Return the client that a token belongs to.

        Raises:
            Unauthenticated: It belongs to no client.
        """
        if not (client := self.find(token)):
            raise unauthenticated()
        return client

    def find(self, token: str) -> str:
        """Return the client that a token belongs to; empty if it belongs to none."""
        # Without the lock: one lookup in a dict is atomic, and every request passes here.
        return self._clients.get(token, "")


class VouchedClients(ClientRegistry):
    """The clients of a follower: all whose token was made with the key of the leader.

    So a follower needs no list of clients, and a token is as good as the leader's word for it. The
    leader decides at Open whether the client is still one of the run.
    """

    def admit(self, client: str) -> str:
        """Return the token of a client."""
        return token_of(client, self.key)

    def forget(self, client: str) -> None:
        """Do nothing, because there is no list."""

    def find(self, token: str) -> str:
        """Return the client that a token belongs to; empty if it belongs to none."""
        client = token.rpartition(".")[0]
        # The time of a plain comparison tells how long the correct prefix of a guess is.
        is_right = hmac.compare_digest(token.encode(), token_of(client, self.key).encode())
        return client if is_right else ""


def unauthenticated() -> Unauthenticated:
    """Return the error for a token that belongs to no client."""
    return Unauthenticated(
        "the token is missing or not one of this run; use the one that the run's first message "
        "brought"
    )
