"""The crash matrix with real processes: each run must end by itself with the same weights.

A run of three rounds is started in a way of use, and a process of it is killed or frozen at a named
point. The harness is its service manager: it starts again a command that it killed, and nothing
else. `points` is the number of cases, `equal` of those whose final weights are bit for bit those of
an undisturbed run, and `persons` of those that needed somebody.

`recovery_s_max` is the longest time without progress (a step of the trunk, a pass of an evaluation
or the result) from the fault on, less the load time: the time from the start of the process with
the trunk to its first step in the undisturbed run. For a process that was frozen, the time that it
stood still is left out too.
"""

import json
import signal
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fedsplit.errors import ConfigError
from simulations.bench.report import Report
from simulations.faults.crash import FROZEN_S, Case, run_with
from simulations.faults.matrix import cases
from simulations.faults.overhead import round_seconds
from simulations.faults.ways import WAYS, settings

_SETTINGS: dict[str, Callable[[Path], list[str]]] = {"full": lambda _: [], "toy": settings}
_PAIRS = {"full": 4, "toy": 1}
_ROUNDS = {"full": 6, "toy": 2}


def measure(size: str, only: str = "", rows: str = "") -> Report:
    """Fill a report with the cases of the ways in `only` (with commas), or of all.

    Args:
        size: "full", or "toy" for the first case of inline runs.
        only: The ways of use, or "overhead" for the cost of checkpoints alone.
        rows: A file of JSON lines, which gets each row when it is there. Rows that it has already
            are not measured again.
    """
    # Otherwise the end of this process would leave the processes of a run.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    report = Report()
    usual = ("inline", "overhead") if size == "toy" else (*WAYS, "overhead")
    wanted = only.split(",") if only else usual
    if unknown := set(wanted) - {*WAYS, "overhead"}:
        raise ConfigError(f"--only={','.join(unknown)}: choose of {', '.join(WAYS)}, overhead")
    kept = _Kept(Path(rows) if rows else None)
    for way in (each for each in WAYS if each in wanted):
        _measure_way(way, cases(way)[:1] if size == "toy" else cases(way), kept, report)
    recoveries = [v for name, v in report.figures.items() if name.startswith("recovery_s_max_")]
    if recoveries:
        report.figures["recovery_s_max"] = max(recoveries)
    if "overhead" in wanted:
        _measure_overhead(size, report)
    return report


class _Kept:
    """The rows of earlier calls, which a file keeps."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        text = file.read_text(encoding="utf-8") if file and file.exists() else ""
        rows = (json.loads(line) for line in text.splitlines())
        self._rows: dict[str, dict[str, Any]] = {row["case"]: row for row in rows}

    def row(self, case: str, measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the row of a case, which is measured unless it is there."""
        if case not in self._rows:
            self._rows[case] = {"case": case, **measured()}
            if self._file:
                with self._file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(self._rows[case]) + "\n")
        return self._rows[case]


def _measure_way(way: str, listed: Iterable[Case], kept: _Kept, report: Report) -> None:
    undisturbed = kept.row(f"{way}: undisturbed", lambda: asdict(run_with(way, None)))
    report.row("undisturbed", way=way, load_s=undisturbed["load_s"], why=undisturbed["why"])
    rows = []
    for case in (each for each in listed if each.way == way):
        row = kept.row(str(case), partial(_row, case, undisturbed))
        report.row("fault", **row)
        rows.append(row)
    figures = {
        "points": len(rows),
        "equal": sum(row["equal"] for row in rows),
        "persons": sum(row["persons"] for row in rows),
        "leftover_processes": sum(row["leftover"] for row in rows),
    }
    for name, value in figures.items():
        report.figures[name] = report.figures.get(name, 0.0) + value
    if rows:
        report.figures[f"recovery_s_max_{way}"] = max(row["recovery_s"] for row in rows)


def _row(case: Case, undisturbed: dict[str, Any]) -> dict[str, Any]:
    outcome, load_s = run_with(case.way, case), undisturbed["load_s"]
    still_s = FROZEN_S if case.action == "freeze" else 0.0
    is_equal = outcome.weights == undisturbed["weights"]
    return {
        "equal": bool(outcome.weights) and not outcome.why and is_equal,
        # Without a result, somebody would have to look.
        "persons": int(not outcome.weights),
        "recovery_s": max(0.0, outcome.recovery_s - load_s - still_s),
        "gap_s": outcome.recovery_s,
        "load_s": load_s,
        "restarts": outcome.restarts,
        "leftover": outcome.leftover,
        "why": outcome.why,
    }


def _measure_overhead(size: str, report: Report) -> None:
    """Compare rounds of the default run with checkpoints after each round and without any."""
    ratios = []
    for pair in range(_PAIRS[size]):
        # In turns, because the first of two runs would have the warmer caches of the other.
        order = (1, 0) if pair % 2 else (0, 1)
        rounds = {n: round_seconds(n, _ROUNDS[size], _SETTINGS[size]) for n in order}
        seconds = {n: statistics.median(times) for n, times in rounds.items()}
        report.row("rounds", pair=pair, saved_s=seconds[1], unsaved_s=seconds[0])
        ratios.append(seconds[1] / seconds[0])
    report.figures["checkpoint_overhead"] = report.spread("checkpoint overhead", ratios)
