"""The samples of the soak: memory, descriptors and threads of processes, and the times of steps."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from simulations.soak.trend import Trend, suffices, trend_of

Series = tuple[list[float], list[float]]
"""Times, in seconds since the beginning, and the values at these times."""

_UNITS = {"rss": "MiB", "descriptors": "descriptors", "threads": "threads", "step": "s"}


class Samples:
    """The series of all quantities; the name of each is `<what>_<of which process>`.

    Args:
        processes: The processes that are sampled, by name.
    """

    def __init__(self, processes: Mapping[str, psutil.Process]) -> None:
        self.series: dict[str, Series] = {}
        self._processes = processes
        self._began = time.monotonic()

    def take(self) -> None:
        """Sample every process, from outside of it."""
        for name, process in self._processes.items():
            self.add(f"rss_{name}", process.memory_info().rss / (1 << 20))
            self.add(f"descriptors_{name}", process.num_fds())
            self.add(f"threads_{name}", process.num_threads())

    def add(self, quantity: str, *new: float) -> None:
        """Add values that a quantity has now."""
        times, values = self.series.setdefault(quantity, ([], []))
        times += [time.monotonic() - self._began] * len(new)
        values += new

    @property
    def too_few(self) -> list[str]:
        """The quantities that have too few values for a trend."""
        return [name for name, (times, _) in self.series.items() if not suffices(times)]

    def trends(self) -> dict[str, Trend]:
        """Return the trend of each quantity that has one; the intervals together hold with 95 %."""
        series = {name: self.series[name] for name in self.series if name not in self.too_few}
        return {name: trend_of(*each, of=len(series)) for name, each in series.items()}


def unit_of(quantity: str) -> str:
    """Return the unit of a quantity."""
    return _UNITS[what_of(quantity)]


def what_of(quantity: str) -> str:
    """Return what a quantity measures: `rss`, `descriptors`, `threads` or `step`."""
    return quantity.partition("_")[0]


class Rounds:
    """The rounds of a training run, as its folder tells them while it runs.

    Args:
        parent: The folder of the run's folder.
    """

    def __init__(self, parent: Path) -> None:
        self.read: list[dict[str, Any]] = []
        self._parent = parent
        self._offset = 0

    def take(self) -> list[dict[str, Any]]:
        """Return the rounds that have ended since the last call."""
        for file in self._parent.glob("*/metrics.jsonl"):
            with file.open("rb") as lines:
                lines.seek(self._offset)
                text = lines.read()
            # The last line may not be complete yet.
            whole = text[: text.rfind(b"\n") + 1]
            self._offset += len(whole)
            new = [json.loads(line) for line in whole.splitlines()]
            self.read += new
            return new
        return []

    def differences(self, undisturbed: "Rounds") -> list[str]:
        """Return the rounds whose numbers are others than those of an undisturbed run."""
        return [
            f"round {ours['round']}: {name} is {ours[name]} in place of {theirs[name]}"
            for ours, theirs in zip(self.read, undisturbed.read, strict=False)
            for name in _NUMBERS
            if ours[name] != theirs[name]
        ]


# Not the seconds, and not the bytes, which count what was sent again.
_NUMBERS = ("round", "loss", "eval_loss", "tokens", "clients", "failed", "version", "steps")
