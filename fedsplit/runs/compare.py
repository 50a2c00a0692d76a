"""Runs side by side: those that differ in their seed only are one row, and one line of a plot.

Everything is read from the folders that runs leave (`fedsplit.runs.folder`).
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedsplit import atomic
from fedsplit.console import table_text
from fedsplit.errors import DataError
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.metrics import RoundStats, in_mib
from fedsplit.spec import RunSpec

Row = dict[str, Any]
"""One row of a table: plain values by column; None where there is nothing to tell."""

Columns = Mapping[str, Callable[[Row], str]]
"""Columns of a printed table: their heads, and what stands there for a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run left: where, what it was, and its rounds."""

    path: Path
    spec: RunSpec
    rounds: list[RoundStats]

    @staticmethod
    def read(path: Path) -> "Run":
        """The run in a folder.

        Raises:
            DataError: It is not a run's folder, is damaged, or has no finished round.
        """
        folder = RunFolder(path)
        return Run(path=path, spec=folder.run, rounds=folder.measured_rounds())

    def total(self, measure: str) -> float:
        """The sum of a measure of its rounds; NaN if one of them lacks it."""
        return float(sum(getattr(stats, measure) for stats in self.rounds))

    def held_out(self, measure: str) -> list[float]:
        """A held-out measure in the rounds that have one, never empty."""
        return _finite(getattr(stats, measure) for stats in self.rounds) or [math.nan]

    def curve(self, measure: str) -> list[tuple[float, float]]:
        """Held-out loss against the sum of a measure so far, in the rounds that have a loss."""
        so_far = accumulate(_AXES[measure](stats) for stats in self.rounds)
        pairs = zip(so_far, (stats.eval_loss for stats in self.rounds), strict=True)
        return [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Runs that differ in their seed only, one for each seed, under a name."""

    name: str
    runs: list[Run]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What a comparison came to: rows, how they are printed, and the few numbers it is about."""

    rows: list[Row]
    columns: Columns
    figures: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """Aligned text: the rows without columns that are empty in all of them, the figures."""
        cells = [[head, *map(tell, self.rows)] for head, tell in self.columns.items()]
        columns = [column for column in cells if any(column[1:])]
        text = _aligned(columns)
        if self.figures:
            told = [f"{value:.4g}" for value in self.figures.values()]
            text += f"\n\n{_aligned([list(self.figures), told])}"
        return text

    def write(self, folder: Path) -> Path:
        """Write `table.json`; a number that is not finite is null there.

        Returns:
            The file.
        """
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "table.json"
        told = {"figures": _plain(self.figures), "rows": _plain(self.rows)}
        atomic.write_text(file, json.dumps(told, indent=2, allow_nan=False) + "\n")
        return file


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """The runs in these folders, each once.

    A folder of runs stands for all of them that have a round. One that a comparison left is
    passed over, so that `runs/*` may be compared again.

    Raises:
        DataError: One of them is no such folder, or there is no run at all.
    """
    found: dict[Path, Run] = {}
    for path in paths:
        inside = sorted(file.parent for file in path.glob("*/metrics.jsonl"))
        if inside or not (path / "table.json").is_file():
            for folder in inside or [path]:
                found.setdefault(folder.resolve(), Run.read(folder))
    if not found:
        raise DataError("there is no run in these folders; give some that runs left")
    return list(found.values())


def grouped(runs: Iterable[Run]) -> list[Group]:
    """Runs by all settings but the seed, named by what differs; of two equal ones, the last."""
    by_settings: dict[str, dict[int, Run]] = {}
    for run in runs:
        by_settings.setdefault(json.dumps(_settings(run.spec)), {})[run.spec.seed] = run
    same = [[by_seed[seed] for seed in sorted(by_seed)] for by_seed in by_settings.values()]
    told = differences([members[0].spec for members in same])
    return [
        Group(name=_words(one) or members[0].spec.name, runs=members)
        for one, members in zip(told, same, strict=True)
    ]


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None)


def differences(specs: Sequence[RunSpec]) -> list[dict[str, Any]]:
    """For each run its settings, by dotted name, that are not the same in all of them."""
    all_settings = [_settings(spec) for spec in specs]
    names = list(dict.fromkeys(name for settings in all_settings for name in settings))
    differing = [n for n in names if any(s.get(n) != all_settings[0].get(n) for s in all_settings)]
    return [{name: settings.get(name) for name in differing} for settings in all_settings]


def rows_of(groups: Sequence[Group]) -> list[Row]:
    """A row for each group: what it is, and means over its seeds with their spread."""
    settings = differences([group.runs[0].spec for group in groups])
    return [_row(group, one) for group, one in zip(groups, settings, strict=True)]


def _row(group: Group, settings: dict[str, Any]) -> Row:
    row: Row = {
        "name": group.name,
        "settings": settings,
        "seeds": [run.spec.seed for run in group.runs],
        "folders": [str(run.path) for run in group.runs],
        "rounds": min(len(run.rounds) for run in group.runs),
    }
    for name, measure in _HELD_OUT.items():
        finals, best = [run.held_out(measure)[-1] for run in group.runs], _BEST[name]
        row[name] = fmean(finals)
        row[f"{name}_spread"] = _spread(finals)
        row[f"best_{name}"] = fmean(best(run.held_out(measure)) for run in group.runs)
    for measure in _TOTALS:
        row[measure] = fmean(run.total(measure) for run in group.runs)
    row["client_bytes"] = max(s.client_bytes for run in group.runs for s in run.rounds)
    return row


_HELD_OUT = {"loss": "eval_loss", "bits_per_byte": "bits_per_byte", "accuracy": "accuracy"}
_BEST: dict[str, Callable[[list[float]], float]] = {
    "loss": min,
    "bits_per_byte": min,
    "accuracy": max,
}
_TOTALS = (
    "steps",
    "tokens",
    "bytes_up",
    "bytes_down",
    "halves_bytes",
    "seconds",
    "virtual_seconds",
)


# --- as text --------------------------------------------------------------------------------------


def number(value: float, form: str = ".4f") -> str:
    """A number as text; nothing for one that is not finite."""
    return format(value, form) if math.isfinite(value) else ""


def _with_spread(row: Row, name: str) -> str:
    spread = row[f"{name}_spread"]
    return number(row[name]) + (f" +- {spread:.4f}" if math.isfinite(spread) else "")


COLUMNS: Columns = {
    "run": lambda row: str(row["name"]),
    "seeds": lambda row: str(len(row["seeds"])),
    "held-out loss": lambda row: _with_spread(row, "loss"),
    "best": lambda row: number(row["best_loss"]),
    "bits/byte": lambda row: _with_spread(row, "bits_per_byte"),
    "accuracy": lambda row: _with_spread(row, "accuracy"),
    "steps": lambda row: f"{row['steps']:,.0f}",
    "tokens": lambda row: f"{row['tokens']:,.0f}",
    "up": lambda row: in_mib(row["bytes_up"]),
    "down": lambda row: in_mib(row["bytes_down"]),
    "halves": lambda row: in_mib(row["halves_bytes"]),
    "seconds": lambda row: number(row["seconds"], ".1f"),
    "virtual s": lambda row: number(row["virtual_seconds"], ".0f"),
    "client memory": lambda row: in_mib(row["client_bytes"]) if row["client_bytes"] else "",
}
"""What is printed of a comparison."""


def _aligned(columns: Sequence[Sequence[str]]) -> str:
    return table_text(zip(*columns, strict=True), right=range(1, len(columns)))


# --- as a picture ---------------------------------------------------------------------------------

_AXES: dict[str, Callable[[RoundStats], float]] = {
    "round": lambda stats: 1,
    "MiB between clients and server": lambda stats: (
        (stats.bytes_up + stats.bytes_down + stats.halves_bytes) / 2**20
    ),
    "optimizer steps of all clients": lambda stats: stats.steps,
    "seconds": lambda stats: stats.seconds,
    "virtual seconds": lambda stats: stats.virtual_seconds,
}


def plot(groups: Sequence[Group], folder: Path) -> Path:
    """Draw `compare.png`: held-out loss against rounds, bytes, steps and seconds.

    A line is the mean over seeds, with a band of one standard deviation around it. Seconds are
    virtual ones as well, where all runs have them.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = [run for group in groups for run in group.runs]
    axes = [name for name in _AXES if all(run.curve(name) for run in runs)]
    figure = Figure(figsize=(6 * len(axes), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0] if axes else []
    for panel, axis in zip(panels, axes, strict=True):
        for group in groups:
            _draw(panel, group, axis)
        panel.set_xlabel(axis)
    if axes:
        panels[0].set_ylabel("held-out loss (nats per token)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    file = folder / "compare.png"
    with atomic.new_file(file) as unfinished:
        figure.savefig(unfinished, dpi=100)
    return file


def _draw(panel: Axes, group: Group, axis: str) -> None:
    points = list(zip(*(run.curve(axis) for run in group.runs), strict=False))
    xs = [fmean(x for x, _ in seeds) for seeds in points]
    losses = [[loss for _, loss in seeds] for seeds in points]
    means = [fmean(seeds) for seeds in losses]
    (line,) = panel.plot(xs, means, label=group.name)
    if len(group.runs) > 1:
        spreads = [_spread(seeds) for seeds in losses]
        low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
        high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
        panel.fill_between(xs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def _spread(values: Sequence[float]) -> float:
    """The sample's standard deviation; NaN for one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _settings(spec: RunSpec) -> dict[str, Any]:
    return {name: value for name, value in spec.settings.items() if name != "seed"}


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
