"""The interface between a strategy and the records of its run."""

from collections.abc import Mapping
from typing import Protocol

from flwr.app import ArrayRecord

from fedsplit.telemetry.round import RoundStats


class Recorder(Protocol):
    """The records of a run that a strategy writes, and from which it goes back."""

    def on_round(self, stats: RoundStats, arrays: ArrayRecord, *, is_good: bool) -> None:
        """Record a round with the client weights after it; only a good one is saved."""
        ...

    @property
    def checkpoints(self) -> Mapping[int, Mapping[str, int]]:
        """The ids of the clients' states that go with each checkpoint, by round, oldest first."""
        ...

    def save(self, number: int) -> None:
        """Write the checkpoint of a round."""
        ...

    def go_back(self, number: int) -> tuple[int, ArrayRecord]:
        """Load the newest intact checkpoint of a round or before into trunk and strategy.

        Returns:
            The next round, and the client weights.
        """
        ...

    def end_diverged(self, reason: str) -> str:
        """Write the result of a run that diverged; return what it is."""
        ...
