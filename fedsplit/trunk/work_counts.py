"""The work of each client at a trunk, as the trunk itself counts it."""

import threading
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkCount:
    """The work of one client.

    `steps` were accepted, and `tokens` is the sum of their tokens. `positions` are the sequences
    times tokens of all forwards, in training and evaluation.
    """

    steps: int = 0
    tokens: int = 0
    positions: int = 0

    def __add__(self, other: "WorkCount") -> "WorkCount":
        return WorkCount(
            steps=self.steps + other.steps,
            tokens=self.tokens + other.tokens,
            positions=self.positions + other.positions,
        )


class WorkCounts:
    """The work of all clients since it was taken last; several threads may use it."""

    def __init__(self) -> None:
        self._counts: dict[str, WorkCount] = {}
        self._lock = threading.Lock()

    def stepped(self, client: str, num_tokens: int) -> None:
        """Count a step that was accepted."""
        self._add(client, WorkCount(steps=1, tokens=num_tokens))

    def passed(self, client: str, positions: int) -> None:
        """Count a forward."""
        self._add(client, WorkCount(positions=positions))

    def take(self, client: str) -> WorkCount:
        """Return a client's work since the last call for this client."""
        with self._lock:
            return self._counts.pop(client, WorkCount())

    def _add(self, client: str, count: WorkCount) -> None:
        with self._lock:
            before = self._counts.get(client)
            self._counts[client] = before + count if before else count
