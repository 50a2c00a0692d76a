"""The comparison of runs, as a table and a plot; runs that differ only in the seed are one row.

All data is read from the folders of the runs (`fedsplit.runs.folder`).
"""

import json
import logging
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
from fedsplit.spec import RunSpec
from fedsplit.telemetry.round import RoundStats, in_mib, plain

log = logging.getLogger(__name__)

Row = dict[str, Any]
"""One row of a table: plain values by column; None if a column has no value."""

Columns = Mapping[str, Callable[[Row], str]]
"""Columns of a printed table: the heads, and functions that return a row's text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run that is compared: its folder, its settings, and its rounds."""

    path: Path
    spec: RunSpec
    rounds: list[RoundStats]

    @staticmethod
    def read(path: Path) -> "Run":
        """Return the run in a folder.

        Raises:
            DataError: The folder is not a run's folder, is damaged, or has no finished round.
        """
        folder = RunFolder(path)
        return Run(path=path, spec=folder.run, rounds=folder.measured_rounds())

    def total(self, measure: str) -> float:
        """Return the sum of a measure over the rounds; NaN if a round does not have it."""
        return float(sum(getattr(stats, measure) for stats in self.rounds))

    def held_out(self, measure: str) -> list[float]:
        """Return a held-out measure of the rounds that have it; `[nan]` if no round does."""
        return _finite(getattr(stats, measure) for stats in self.rounds) or [math.nan]

    def curve(self, measure: str) -> list[tuple[float, float]]:
        """Return (sum of a measure so far, held-out loss) for the rounds that have a loss."""
        # Accumulated before rounds without a loss are left out: they cost bytes and time too.
        sums = accumulate(_AXES[measure](stats) for stats in self.rounds)
        pairs = zip(sums, (stats.eval_loss for stats in self.rounds), strict=True)
        return [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Runs that differ only in their seed, one per seed, and their common name."""

    name: str
    runs: list[Run]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The result of a comparison: its rows, the printed columns, and its figures by name."""

    rows: list[Row]
    columns: Columns
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def filled_columns(self) -> list[list[str]]:
        """The head and the cells of each column that is not always empty."""
        cells = [[head, *map(text_of, self.rows)] for head, text_of in self.columns.items()]
        return [column for column in cells if any(column[1:])]

    def __str__(self) -> str:
        """Aligned text of the rows and the figures, without columns that are always empty."""
        text = _aligned(self.filled_columns)
        if self.figures:
            values = [f"{value:.4g}" for value in self.figures.values()]
            text += f"\n\n{_aligned([list(self.figures), values])}"
        return "\n".join([text, *unlike(self.rows)])

    def write(self, folder: Path) -> Path:
        """Write `table.json`; a number that is not finite is null there.

        Returns:
            The file.
        """
        atomic.make_folder(folder)
        file = folder / "table.json"
        content = {"figures": plain(self.figures), "rows": plain(self.rows)}
        atomic.write_text(file, json.dumps(content, indent=2, allow_nan=False) + "\n")
        return file


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Return the runs in these folders, each once.

    A folder of runs stands for all its runs that have a finished round. The folder of a comparison
    is skipped, so that `runs/*` can be compared again.

    Raises:
        DataError: A path is none of these folders, or there is no run at all.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        inside = sorted(file.parent for file in path.glob("*/metrics.jsonl"))
        if inside or not (path / "table.json").is_file():
            for folder in inside or [path]:
                runs.setdefault(folder.resolve(), Run.read(folder))
    if not runs:
        raise DataError("these folders have no run; give folders of runs, such as runs/default")
    return list(runs.values())


def grouped(runs: Iterable[Run]) -> list[Group]:
    """Group runs by all settings except the seed, and name each group by what differs.

    If that is more than a few settings, each group has the name of its first run's folder. Of two
    runs with equal settings and seeds, the last one counts, and a warning names the other.
    """
    # By JSON, since settings have lists and dicts, which cannot be keys.
    by_settings: dict[str, dict[int, Run]] = {}
    for run in runs:
        by_seed = by_settings.setdefault(json.dumps(_settings(run.spec)), {})
        if other := by_seed.get(run.spec.seed):
            log.warning("%s is left out: %s has the same settings and seed", other.path, run.path)
        by_seed[run.spec.seed] = run
    same = [[by_seed[seed] for seed in sorted(by_seed)] for by_seed in by_settings.values()]
    differing = differences([members[0].spec for members in same])
    pairs = zip(differing, same, strict=True)
    names = [_words(settings) or members[0].spec.name for settings, members in pairs]
    if any(len(settings) > _MOST_SETTINGS for settings in differing):
        names = _folder_names([members[0].path for members in same])
    return [Group(name=name, runs=members) for name, members in zip(names, same, strict=True)]


_MOST_SETTINGS = 4
"""With more settings, a row's name would be wider than the table and the legend of the plot."""


def _folder_names(paths: Sequence[Path]) -> list[str]:
    names = [path.resolve().name for path in paths]
    # Runs in folders of their own may have one name.
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None)


def differences(specs: Sequence[RunSpec]) -> list[dict[str, Any]]:
    """Return for each run the settings, by dotted name, that differ between the runs."""
    all_settings = [_settings(spec) for spec in specs]
    names = list(dict.fromkeys(name for settings in all_settings for name in settings))
    differing = [n for n in names if any(s.get(n) != all_settings[0].get(n) for s in all_settings)]
    return [{name: settings.get(name) for name in differing} for settings in all_settings]


def rows_of(groups: Sequence[Group]) -> list[Row]:
    """Return a row for each group: its settings, and means over its seeds with their spread."""
    settings = differences([group.runs[0].spec for group in groups])
    return [_row(group, one) for group, one in zip(groups, settings, strict=True)]


def _row(group: Group, settings: dict[str, Any]) -> Row:
    row: Row = {
        "name": group.name,
        "settings": settings,
        "seeds": [run.spec.seed for run in group.runs],
        "folders": [str(run.path) for run in group.runs],
        # Runs that stop early differ in length.
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


def unlike(rows: Sequence[Row]) -> list[str]:
    """Return lines about the rows that are not compared like with like."""
    names = dict.fromkeys(name for row in rows for name in row.get("settings", ()))
    data = [name for name in names if name.startswith(_OF_THE_LOSS)]
    costs = {"client steps": "steps", "tokens": "tokens"}
    amounts = [name for name, key in costs.items() if len({row.get(key) for row in rows}) > 1]
    lines = []
    if data:
        lines.append(f"losses are of different data, tasks or tokenizers: {', '.join(data)} differ")
    if amounts:
        lines.append(f"the rows differ in what was trained: {' and '.join(amounts)}")
    return lines


_OF_THE_LOSS = ("data.", "task", "model.pretrained", "model.revision")
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
    "client_weights_bytes",
    "seconds",
    "virtual_seconds",
)


# --- as text --------------------------------------------------------------------------------------


def number(value: float, form: str = ".4f") -> str:
    """Return a number as text; "" if it is not finite."""
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
    "client steps": lambda row: f"{row['steps']:,.0f}",
    "tokens": lambda row: f"{row['tokens']:,.0f}",
    "up": lambda row: in_mib(row["bytes_up"]),
    "down": lambda row: in_mib(row["bytes_down"]),
    "weights": lambda row: in_mib(row["client_weights_bytes"]),
    "seconds": lambda row: number(row["seconds"], ".1f"),
    "virtual s": lambda row: number(row["virtual_seconds"], ".0f"),
    "client memory": lambda row: in_mib(row["client_bytes"]) if row["client_bytes"] else "",
}
"""The columns of a printed comparison."""


def _aligned(columns: Sequence[Sequence[str]]) -> str:
    return table_text(zip(*columns, strict=True), right=range(1, len(columns)))


# --- as a picture ---------------------------------------------------------------------------------

_AXES: dict[str, Callable[[RoundStats], float]] = {
    "round": lambda stats: 1,
    "MiB between clients and server": lambda stats: (
        (stats.bytes_up + stats.bytes_down + stats.client_weights_bytes) / 2**20
    ),
    "client steps": lambda stats: stats.steps,
    "seconds": lambda stats: stats.seconds,
    "virtual seconds": lambda stats: stats.virtual_seconds,
}


def axes_of(groups: Sequence[Group]) -> list[str]:
    """Return the measures over which the losses of all runs can be drawn."""
    runs = [run for group in groups for run in group.runs]
    return [name for name in _AXES if all(run.curve(name) for run in runs)]


def plot(groups: Sequence[Group], folder: Path) -> Path:
    """Draw `compare.png`: held-out loss over rounds, bytes, steps, seconds and virtual seconds.

    A line is the mean over seeds, with a band of one standard deviation around it. A measure that
    not all runs have gets no panel.

    Returns:
        The file.
    """
    atomic.make_folder(folder)
    axes = axes_of(groups)
    figure = Figure(figsize=(6 * max(1, len(axes)), 4.5), layout="constrained")
    # pyplot would keep the figure in a global list, and choose a display.
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0] if axes else []
    for panel, axis in zip(panels, axes, strict=True):
        for number, group in enumerate(groups):
            draw_group(panel, group, axis, number)
        panel.set_xlabel(axis)
    if axes:
        panels[0].set_ylabel("held-out loss (nats per token)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    file = folder / "compare.png"
    with atomic.new_file(file) as unfinished:
        figure.savefig(unfinished, dpi=100)
    return file


LINES = ("-", "--", "-.", ":")
"""The dashes of the lines of groups, one after the other."""
_MARKERS = "osD^vx+"


def draw_group(panel: Axes, group: Group, axis: str, number: int) -> None:
    """Draw the losses of a group's runs over a measure, in the style of the group's number."""
    # A run that stopped early ends the group's line: a mean over fewer seeds would jump.
    points = list(zip(*(run.curve(axis) for run in group.runs), strict=False))
    xs = [fmean(x for x, _ in seeds) for seeds in points]
    losses = [[loss for _, loss in seeds] for seeds in points]
    means = [fmean(seeds) for seeds in losses]
    # Lines that lie on each other differ in dashes and markers, and later ones are narrower.
    (line,) = panel.plot(
        xs,
        means,
        label=group.name,
        linestyle=LINES[number % len(LINES)],
        linewidth=max(1.0, 3.0 - number / 2),
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=4,
        fillstyle="none",
    )
    if len(group.runs) > 1:
        spreads = [_spread(seeds) for seeds in losses]
        low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
        high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
        panel.fill_between(xs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def _spread(values: Sequence[float]) -> float:
    """Return the standard deviation of a sample; NaN for one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _settings(spec: RunSpec) -> dict[str, Any]:
    return {name: value for name, value in spec.settings.items() if name != "seed"}


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
