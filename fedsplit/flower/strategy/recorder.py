"""The interface between a strategy and the records of its run."""

from typing import Protocol

from flwr.app import ArrayRecord

from fedsplit.runs.metrics import RoundStats


class Recorder(Protocol):
    """The records of a run that a strategy writes, and from which it goes back."""

    def on_round(self, stats: RoundStats, arrays: ArrayRecord) -> None:
        """Record a round with the client weights after it."""
        ...

    @property
    def last_checkpoint(self) -> int:
        """The round of the last checkpoint; 0 if there is none."""
        ...

    def go_back(self) -> ArrayRecord:
        """Load the last checkpoint into trunk and strategy; return its client weights."""
        ...

    def end_with_last_checkpoint(self, reason: str) -> None:
        """Write the result of a run that diverged."""
        ...
