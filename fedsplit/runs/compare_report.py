"""The report of a comparison, `report.html`: its table, its curves, and what differs."""

import os
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup
from matplotlib.axes import Axes

from fedsplit import atomic
from fedsplit.runs.compare import (
    LINES,
    Group,
    Row,
    Table,
    axes_of,
    draw_group,
    number,
    unlike,
)
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.next_commands import generation_commands
from fedsplit.runs.page import Chart, Key, PageTable, render
from fedsplit.runs.summary import Figure, bytes_text, counted, duration_text
from fedsplit.runs.svg import SERIES, chart

_MAIN = """\
{% extends "page" %}
{% import "parts" as parts %}
{% block main %}
<h1>{{ title }}</h1>
<p class="soft">{{ subtitle }}</p>
{{ parts.headline(headline) }}

<h2>Runs</h2>
{{ parts.table(runs) }}
{% for line in unlike %}
<p class="soft after">{{ line }}</p>
{% endfor %}

{% if charts %}
<h2>Held-out loss, nats per token</h2>
<p>{{ parts.keys(keys) }}</p>
{{ parts.charts(charts) }}
{% endif %}

{% if figures.rows %}
<h2>Figures</h2>
{{ parts.table(figures) }}
{% endif %}

{% if settings.rows %}
<h2>Settings that differ</h2>
{{ parts.table(settings) }}
{% endif %}

<h2>Folders</h2>
{{ parts.table(folders) }}
{{ parts.commands(commands) }}
{% endblock %}
"""

# CSS has no dash and dot.
_DASHES = dict(zip(LINES, ("solid", "dashed", "dashed", "dotted"), strict=True))


def write_comparison(table: Table, groups: Sequence[Group], folder: Path) -> Path:
    """Write `report.html` of a comparison into a folder.

    Args:
        table: The comparison.
        groups: The runs of each row.
        folder: The folder of the comparison.

    Returns:
        The file.

    Raises:
        StorageError: The file cannot be written.
    """
    atomic.make_folder(folder)
    file = folder / "report.html"
    keys = [
        Key(name=group.name, color=n % SERIES, dash=_DASHES[LINES[n % len(LINES)]])
        for n, group in enumerate(groups)
    ]
    runs = sum(len(group.runs) for group in groups)
    content = {
        "title": "Comparison",
        "subtitle": f"{counted(runs, 'run')} in {counted(len(groups), 'row')}; runs that differ "
        "only in the seed are one row, which has their means",
        "headline": _headline(table.rows),
        "runs": _runs(table),
        "unlike": unlike(table.rows),
        "keys": keys,
        "charts": _charts(groups),
        "figures": PageTable(
            label="figures",
            heads=("figure", "value"),
            rows=[(name, f"{value:.4g}") for name, value in table.figures.items()],
        ),
        "settings": _settings(table.rows),
        "folders": _folders(groups, folder),
        "commands": _commands(table.rows, groups),
    }
    atomic.write_text(file, render(_MAIN, content))
    return file


def _headline(rows: Sequence[Row]) -> list[Figure]:
    """Return the rows with the lowest held-out loss, the fewest bytes and the shortest time."""
    loss = _lowest(rows, "loss")
    cheap = min(rows, key=_bytes_per_step)
    quick = min(rows, key=lambda row: float(row["seconds"]))
    value, unit = bytes_text(_bytes_per_step(cheap)).split()
    return [
        Figure(
            name="Lowest held-out loss",
            value=number(loss["loss"]) or "-",
            unit="nats",
            note=str(loss["name"]),
        ),
        Figure(name="Fewest bytes per step", value=value, unit=unit, note=str(cheap["name"])),
        Figure(
            name="Shortest training",
            value=duration_text(quick["seconds"]),
            unit="",
            note=str(quick["name"]),
        ),
    ]


def _lowest(rows: Sequence[Row], column: str) -> Row:
    # NaN is not below anything.
    return min(rows, key=lambda row: (row[column] != row[column], row[column]))


def _bytes_per_step(row: Row) -> float:
    total: float = row["bytes_up"] + row["bytes_down"]
    return total / max(1.0, float(row["steps"]))


def _runs(table: Table) -> PageTable:
    heads, *rows = zip(*table.filled_columns, strict=True)
    return PageTable(label="runs", heads=heads, rows=rows, is_tall=True)


def _charts(groups: Sequence[Group]) -> list[Chart]:
    def draw(axis: str, axes: Axes) -> None:
        for position, group in enumerate(groups):
            draw_group(axes, group, axis, position)

    return [
        Chart(
            title=f"By {axis}",
            unit="",
            svg=chart(partial(draw, axis), label=f"held-out loss by {axis}", x=axis),
        )
        for axis in axes_of(groups)
    ]


def _settings(rows: Sequence[Row]) -> PageTable:
    names = list(dict.fromkeys(name for row in rows for name in row.get("settings", ())))
    cells = [
        (name, *("" if (v := row["settings"].get(name)) is None else str(v) for row in rows))
        for name in names
    ]
    heads = ("setting", *(str(row["name"]) for row in rows))
    return PageTable(label="settings that differ", heads=heads, rows=cells)


def _folders(groups: Sequence[Group], folder: Path) -> PageTable:
    rows = [
        (group.name, f"{run.spec.seed}", f"{len(run.rounds)}", _link(run.path, folder))
        for group in groups
        for run in group.runs
    ]
    heads = ("run", "seed", "rounds", "folder")
    return PageTable(label="folders", heads=heads, rows=rows, left={0, 3}, is_tall=True)


def _link(run: Path, folder: Path) -> str:
    """Return a run's folder, as a link to its report if it has one."""
    report = run / "report.html"
    if not report.is_file():
        return str(run)
    target = quote(os.path.relpath(report.resolve(), folder.resolve()))
    return Markup('<a href="{}">{}</a>').format(target, run)


def _commands(rows: Sequence[Row], groups: Sequence[Group]) -> list[tuple[str, str]]:
    runs = [run for group in groups for run in group.runs]
    paths = shlex.join(str(run.path) for run in runs)
    best = Path(_lowest(rows, "loss")["folders"][0])
    spec = next(run.spec for run in runs if run.path == best)
    folder = RunFolder(best)
    return [
        ("compare them again", f"fedsplit compare {paths}"),
        ("look at the one with the lowest loss", f"fedsplit report {shlex.quote(str(best))}"),
        *(generation_commands(spec, folder) if folder.is_finished else ()),
    ]
