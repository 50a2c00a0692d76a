"""Plays many schedules, and every planted bug; counts violations and what faults happened to."""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from simulations.schedules.checker import check, final_weights
from simulations.schedules.planted import PLANTED
from simulations.schedules.play import Cast, Played, Stage
from simulations.schedules.schedule import Schedule, schedule_of, shrunk

_REAL = Cast()


@dataclass(slots=True, kw_only=True)
class Findings:
    """What a campaign found.

    Attributes:
        schedules: The number of schedules.
        happened: How often each fault happened, by fault and kind of message.
        violations: The violations of each schedule that has some.
    """

    schedules: int = 0
    happened: Counter[tuple[str, str]] = field(default_factory=Counter)
    violations: list[tuple[Schedule, list[str]]] = field(default_factory=list)


class Campaign:
    """Plays schedules on one stage."""

    def __init__(self) -> None:
        self._stage = Stage()
        self._final: dict[Schedule, dict[str, str]] = {}

    def close(self) -> None:
        """End the threads."""
        self._stage.close()

    def play(self, schedule: Schedule, cast: Cast = _REAL) -> Played:
        """Play a schedule."""
        return self._stage.play(schedule, cast)

    def violations(self, schedule: Schedule, cast: Cast = _REAL) -> list[str]:
        """Play a schedule, and return its violations."""
        return self._check(self.play(schedule, cast))

    def run(self, seeds: range) -> Findings:
        """Play the schedules with these seeds."""
        findings = Findings()
        for seed in seeds:
            played = self.play(schedule_of(seed))
            findings.schedules += 1
            findings.happened += played.happened
            if found := self._check(played):
                findings.violations.append((played.schedule, found))
        return findings

    def planted_found(self) -> list[str]:
        """Return the names of the planted bugs that the checker finds."""
        return [
            name
            for name, bug in PLANTED.items()
            if any(text.startswith(bug.finds) for text in self.violations(bug.schedule, bug.cast()))
        ]

    def shrunk(self, schedule: Schedule, cast: Cast = _REAL) -> Schedule:
        """Return a smaller schedule that has violations, for one that has some."""
        return shrunk(schedule, lambda smaller: bool(self.violations(smaller, cast)))

    def _check(self, played: Played) -> list[str]:
        schedule = played.schedule
        return check(played, self._final_of(schedule) if schedule.is_exact else None)

    def _final_of(self, schedule: Schedule) -> dict[str, str]:
        """Return the weights at the end of the schedule without its faults."""
        calm = replace(schedule, seed=0, faults=(), tokens=(), tight=False)
        if calm not in self._final:
            self._final[calm] = final_weights(self.play(calm))
        return self._final[calm]


@contextmanager
def campaign() -> Iterator[Campaign]:
    """A campaign; refusals, of which schedules have many, are not logged meanwhile."""
    log, made = logging.getLogger("fedsplit"), Campaign()
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield made
    finally:
        log.setLevel(before)
        made.close()
