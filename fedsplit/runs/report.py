"""The report of a run, `report.html`: its settings, its curves, its clients and its traffic."""

import math
from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from fedsplit import atomic
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.metrics import evaluated
from fedsplit.runs.next_commands import next_commands
from fedsplit.runs.page import Chart, Key, PageTable, noted, render
from fedsplit.runs.summary import ClientTotals, Summary, bytes_text, duration_text
from fedsplit.runs.svg import chart, series
from fedsplit.spec import RunSpec
from fedsplit.spec.fields import described
from fedsplit.telemetry.round import RoundStats

_REPORT = "report.html"

_MAIN = """\
{% extends "page" %}
{% import "parts" as parts %}
{% block main %}
<div class="top">
<h1>{{ title }}</h1>
<span class="state {{ state.split(":")[0] }}">{{ state }}, {{ progress }}</span>
</div>
<p class="soft">{{ subtitle }}</p>
{{ parts.headline(headline) }}

<h2>Curves</h2>
{{ parts.charts(charts) }}

<h2>Clients</h2>
{% if clients.rows %}
{{ parts.table(clients) }}
{% else %}
<div class="box notice"><p>The metrics of this run do not name its clients.</p></div>
{% endif %}

<h2>Late and refused contributions</h2>
{% if troubles.rows %}
{{ parts.table(troubles) }}
{% else %}
<div class="box notice"><p>None. Every contribution came in time and was taken.</p></div>
{% endif %}

<h2>Bytes by direction</h2>
{{ parts.table(traffic) }}

<h2>Privacy</h2>
<div{% if told %} class="told"{% endif %}>
<div class="box notice">
<p>{{ privacy }}</p>
{% if leak %}
<p>Measured: {{ leak }}</p>
{% endif %}
</div>
{% if told %}
{{ parts.charts(told) }}
{% endif %}
</div>

{% if sample %}
<h2>Text that the model writes</h2>
<blockquote class="box">{{ sample }}</blockquote>
{% endif %}

<h2>Rounds</h2>
{{ parts.table(rounds) }}

<h2>Settings</h2>
<p class="soft">
Fingerprint <code>{{ fingerprint }}</code>. These differ from the default values:
</p>
{{ parts.table(changed) }}
<details>
<summary>All settings</summary>
{{ parts.table(settings) }}
</details>
{{ parts.commands(commands) }}
{% endblock %}
"""


def write_report(folder: RunFolder, *, is_over: bool = False) -> Path:
    """Write `report.html` into a run's folder.

    Args:
        folder: The folder.
        is_over: Whether the run is over, though its model has not its name yet.

    Returns:
        The file.

    Raises:
        DataError: The folder is not a run's folder, is damaged, or has no finished round.
        StorageError: The file cannot be written.
    """
    folder.measured_rounds()
    file = folder.path / _REPORT
    atomic.write_text(file, report_of(Summary.read(folder, is_over=is_over)))
    return file


def report_of(summary: Summary) -> str:
    """Return the report of a run as HTML; the run has a finished round."""
    run, rounds = summary.run, summary.rounds
    is_text = math.isnan(evaluated(rounds)[-1].accuracy)
    content = {
        "title": summary.folder.path.name,
        "state": summary.state,
        "subtitle": summary.subtitle,
        "progress": summary.progress,
        "headline": summary.headline,
        "charts": _charts(rounds, is_text=is_text),
        "clients": _clients(summary),
        "troubles": PageTable(
            label="late and refused contributions",
            heads=("what", "times", "in rounds"),
            rows=[(noted(t.name, t.meaning), f"{t.count:,}", t.rounds) for t in summary.troubles],
            left={0, 2},
        ),
        "traffic": PageTable(
            label="bytes by direction",
            heads=("what", "whole run", "per round", "per client step"),
            rows=[
                (t.name, *map(bytes_text, (t.total, t.per_round, t.per_step)))
                for t in summary.traffic
            ],
        ),
        "privacy": summary.privacy,
        "leak": summary.measured_leak,
        "told": [_told_chart(rounds)] if rounds[-1].bits else [],
        "sample": summary.sample,
        "rounds": _rounds(summary, is_text=is_text),
        "fingerprint": run.fingerprint,
        "changed": _settings(run, only_changed=True),
        "settings": _settings(run, only_changed=False),
        "commands": next_commands(run, summary.folder, is_over=summary.is_over),
    }
    return render(_MAIN, content)


# --- tables ---------------------------------------------------------------------------------------

_CLIENT_HEADS = (
    "client",
    "share of {unit}",
    "{unit}",
    "steps",
    "rounds",
    "last loss",
    "repeated steps",
    "refused steps",
    "failures",
    "up in training",
    "down in training",
)
_BAR = Markup(
    '<span class="bar"><i style="width: {0:.1f}%"></i></span><span class="percent">{0:.1f} %</span>'
)


def _clients(summary: Summary) -> PageTable:
    return PageTable(
        label="clients",
        heads=[head.format(unit=summary.unit) for head in _CLIENT_HEADS],
        rows=[_client_row(client) for client in summary.clients],
        is_tall=True,
    )


def _client_row(client: ClientTotals) -> tuple[str, ...]:
    return (
        client.name,
        _BAR.format(100 * client.share),
        f"{client.tokens:,}",
        f"{client.steps:,}",
        f"{client.rounds:,}",
        "-" if math.isnan(client.loss) else f"{client.loss:.4f}",
        f"{client.repeated:,}",
        f"{client.refused:,}",
        f"{client.failed:,}",
        bytes_text(client.bytes_up),
        bytes_text(client.bytes_down),
    )


def _rounds(summary: Summary, *, is_text: bool) -> PageTable:
    held_out = "bits/byte" if is_text else "accuracy"
    heads = ("round", "loss", f"held-out {held_out}", summary.unit, "time", "up", "down", "weights")
    return PageTable(
        label="rounds",
        heads=(*heads, "clients", "late", "failed"),
        rows=[_row(stats, is_text=is_text) for stats in summary.rounds],
        is_tall=True,
    )


def _row(stats: RoundStats, *, is_text: bool) -> tuple[str, ...]:
    held_out = f"{stats.bits_per_byte:.4f}" if is_text else f"{stats.accuracy:.1%}"
    return (
        f"{stats.round}",
        f"{stats.loss:.4f}",
        "-" if math.isnan(stats.eval_loss) else held_out,
        f"{stats.tokens:,}",
        duration_text(stats.seconds),
        bytes_text(stats.bytes_up),
        bytes_text(stats.bytes_down),
        bytes_text(stats.client_weights_bytes),
        f"{stats.clients}",
        f"{stats.late}",
        f"{stats.failed}",
    )


def _settings(run: RunSpec, *, only_changed: bool) -> PageTable:
    default = RunSpec()
    rows = []
    for field in (field for group in described() for field in group.fields):
        value = attrgetter(field.name)(run)
        if not only_changed or value != attrgetter(field.name)(default):
            rows.append((noted(field.name, field.phrase), _text_of(value)))
    return PageTable(
        label="changed settings" if only_changed else "all settings",
        heads=("setting", "value"),
        rows=rows,
        left={0, 1},
        is_tall=not only_changed,
    )


def _text_of(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_text_of(each)}" for key, each in value.items()) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


# --- charts ---------------------------------------------------------------------------------------


def _charts(rounds: Sequence[RoundStats], *, is_text: bool) -> list[Chart]:
    speed = [stats.tokens / max(stats.seconds, 1e-9) for stats in rounds]
    measured = evaluated(rounds)
    unit = measured[-1].unit
    return [
        _lines(
            "Loss",
            f"nats per {unit[:-1]}",
            {
                "training": [(stats.round, stats.loss) for stats in rounds],
                "held out": [(stats.round, stats.eval_loss) for stats in measured],
            },
        ),
        _lines("Accuracy", "held out", {"": [(s.round, s.accuracy) for s in measured]})
        if not is_text
        else _lines(
            "Speed",
            f"{unit} per second",
            {"": [(s.round, each) for s, each in zip(rounds, speed, strict=True)]},
            from_zero=True,
        ),
        _bytes_chart(rounds),
    ]


def _told_chart(rounds: Sequence[RoundStats]) -> Chart:
    points = [(stats.round, stats.bits) for stats in rounds]
    return _lines("Told the server", "bits per token, at most", {"": points}, from_zero=True)


_MARKED = 40
"""Points are marked if there are at most so many; more would cover the line."""


def _lines(
    title: str,
    unit: str,
    lines: dict[str, list[tuple[int, float]]],
    *,
    from_zero: bool = False,
) -> Chart:
    def draw(axes: Axes) -> None:
        for number, points in enumerate(lines.values()):
            axes.plot(
                *zip(*points, strict=True),
                color=series(number),
                linewidth=1.8,
                marker="o" if len(points) <= _MARKED else "",
                markersize=3.5,
            )
        if from_zero:
            axes.set_ylim(0, _above(y for points in lines.values() for _, y in points))
        _make_room_for_one(axes, [x for points in lines.values() for x, _ in points])

    keys = [Key(name=name, color=number) for number, name in enumerate(lines) if name]
    return Chart(title=title, unit=unit, svg=chart(draw, label=f"{title}, {unit}"), keys=keys)


def _above(values: Iterable[float]) -> float:
    """Return the upper end of an axis from zero, also if all values are zero."""
    return 1.06 * max(values) or 1.0


def _make_room_for_one(axes: Axes, numbers: Sequence[int]) -> None:
    if min(numbers) == max(numbers):
        axes.set_xlim(numbers[0] - 0.5, numbers[0] + 0.5)


def _bytes_chart(rounds: Sequence[RoundStats]) -> Chart:
    names = {"bytes_up": "up", "bytes_down": "down", "client_weights_bytes": "client weights"}
    # One path for all bars of a kind, since a run may have thousands of rounds.
    half = 0.4 if len(rounds) <= _MARKED else 0.5
    edges = [edge for stats in rounds for edge in (stats.round - half, stats.round + half)]

    def draw(axes: Axes) -> None:
        low = np.zeros(len(rounds))
        for number, field in enumerate(names):
            high = low + [getattr(stats, field) / 2**20 for stats in rounds]
            bars = (_with_gaps(high), _with_gaps(low))
            axes.stairs(bars[0], edges, baseline=bars[1], fill=True, color=series(number))
            low = high
        axes.set_ylim(0, _above(low))

    title, unit = "Bytes by direction", "MiB per round"
    keys = [Key(name=name, color=number) for number, name in enumerate(names.values())]
    return Chart(title=title, unit=unit, svg=chart(draw, label=f"{title}, {unit}"), keys=keys)


def _with_gaps(heights: np.ndarray) -> np.ndarray:
    """Return the heights of bars with a gap between any two."""
    gapped = np.zeros(2 * len(heights) - 1)
    gapped[::2] = heights
    return gapped
