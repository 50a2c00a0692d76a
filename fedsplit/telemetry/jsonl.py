"""The file `metrics.jsonl` of a run: a line for each round, and on request for each step."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from threading import Lock

from fedsplit import atomic
from fedsplit.errors import DataError
from fedsplit.telemetry.events import Event, StepTaken
from fedsplit.telemetry.round import RoundStats, is_round, line_of, parse
from fedsplit.telemetry.sinks import Sink


class MetricsFile:
    """Reads and writes the file.

    The lines of a round's steps come before the line of the round and are written together with
    it, so a round that was not finished has left nothing.

    Args:
        path: The file; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, stats: RoundStats, steps: Iterable[StepTaken] = ()) -> None:
        """Add a round, and before it its steps.

        Raises:
            StorageError: The lines cannot be written; no part of them was added.
        """
        lines = [*(_line_of_step(step, stats.round) for step in steps), line_of(stats)]
        atomic.append_line(self.path, "\n".join(lines))

    def rounds(self) -> list[RoundStats]:
        """Return the rounds; none if there is no file.

        Raises:
            DataError: The file is damaged.
        """
        try:
            return parse(self._lines())
        except (ValueError, TypeError) as exc:
            raise DataError(f"{self.path} does not hold the rounds of a run: {exc}") from exc

    def forget_after(self, number: int) -> None:
        """Remove the rounds after `number`, and their steps.

        Raises:
            DataError: The file is damaged.
            StorageError: The file cannot be written.
        """
        last = sum(stats.round <= number for stats in self.rounds())
        kept: list[str] = []
        for line in self._lines():
            if not last:
                break
            kept.append(line)
            last -= is_round(json.loads(line))
        atomic.write_text(self.path, "".join(f"{line}\n" for line in kept))

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        # The run may be writing its last line at this moment.
        return text[: text.rfind("\n") + 1].splitlines()


class MetricsLines(Sink):
    """Adds every round to a `MetricsFile`.

    Args:
        file: The file.
        steps: Whether steps are added as well.
        budget_s: The longest wait for room on a full disk, in seconds.
    """

    def __init__(self, file: MetricsFile, *, steps: bool, budget_s: float) -> None:
        self._file = file
        self.needs_details = steps
        self._budget_s = budget_s
        self._steps: list[StepTaken] = []
        self._lock = Lock()

    def on_event(self, event: Event) -> None:
        """Keep a step until its round ends, and write a round.

        Raises:
            StorageError: The lines cannot be written.
        """
        if isinstance(event, StepTaken) and self.needs_details:
            with self._lock:
                if self._steps and self._steps[-1].version >= event.version:
                    # Training went back to a checkpoint, and takes these steps again.
                    self._steps = [s for s in self._steps if s.version < event.version]
                self._steps.append(event)
        elif isinstance(event, RoundStats):
            with self._lock:
                steps, self._steps = self._steps, []
            atomic.when_there_is_room(lambda: self._file.append(event, steps), self._budget_s)


def _line_of_step(step: StepTaken, number: int) -> str:
    values = asdict(step)
    if not math.isfinite(step.gradient_norm):
        values["gradient_norm"] = None
    return json.dumps({"step": values.pop("version"), "round": number, **values}, allow_nan=False)
