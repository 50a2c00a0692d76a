"""The work of each client at a trunk, as the trunk itself counts it."""

import threading
from dataclasses import dataclass

from fedsplit.trunk.call import Call, Kind


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

    def add(self, call: Call) -> None:
        """Count a call that was answered without an error."""
        if (count := _work_of(call)) is None:
            return
        with self._lock:
            self._counts[call.client] = self._counts.get(call.client, WorkCount()) + count

    def take(self, client: str) -> WorkCount:
        """Return a client's work since the last call for this client."""
        with self._lock:
            return self._counts.pop(client, WorkCount())


def _work_of(call: Call) -> WorkCount | None:
    match call.kind:
        case Kind.STEP:
            return WorkCount(steps=1, tokens=call.request.num_tokens)
        case Kind.FORWARD | Kind.EVALUATE:
            return WorkCount(positions=call.request.smashed_BTD.shape[:2].numel())
    return None
