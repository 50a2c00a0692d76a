"""A run in a terminal while it trains: the figures of its report, drawn anew every few seconds."""

import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedsplit.errors import one_line
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.summary import ClientTotals, Summary, bytes_text, duration_text
from fedsplit.telemetry.round import RoundStats

_INTERVAL_S = 2.0
_LAST_ROUNDS = 8


def watch(folder: RunFolder, console: Console, sleep: Callable[[float], None] = time.sleep) -> None:
    """Show the figures of a run until it has ended; without a terminal, print them once.

    Args:
        folder: The run's folder.
        console: The terminal.
        sleep: Waits for some seconds, between two looks at the folder.

    Raises:
        DataError: The folder is not a run's folder, or is damaged.
    """
    summary = Summary.read(folder)
    if console.is_terminal:
        # What is too long for the terminal is left out here, and printed at the end.
        with Live(view_of(summary), console=console, auto_refresh=False, transient=True) as live:
            while not summary.is_over:
                sleep(_INTERVAL_S)
                summary = Summary.read(folder)
                live.update(view_of(summary), refresh=True)
    console.print(view_of(summary))


def view_of(summary: Summary) -> RenderableType:
    """Return the figures of a run for a terminal."""
    title = Text.assemble(
        (summary.folder.path.name, "bold"), f"  {one_line(summary.state)}, {summary.progress}"
    )
    top = Group(title, Text(one_line(summary.subtitle), style="dim"))
    if not summary.rounds:
        return Group(top, Text("\nno round is finished yet"))
    return Group(top, *_figures(summary))


def _figures(summary: Summary) -> Iterable[RenderableType]:
    yield _headline(summary)
    rounds = summary.rounds[-_LAST_ROUNDS:]
    yield _table(("round", "loss", "held out", "time", "up", "down"), map(_round, rounds))
    if troubles := [(t.name, f"{t.count:,}", t.rounds) for t in summary.troubles]:
        yield _table(("late and refused", "times", "in rounds"), troubles, left={0, 2})
    else:
        yield Text("\nno late and no refused contributions")
    heads = ("client", "share", summary.unit, "steps", "last loss", "repeated", "refused", "failed")
    yield _table(heads, map(_client, summary.clients))
    sizes = ((t.name, t.total, t.per_round, t.per_step) for t in summary.traffic)
    yield _table(
        ("bytes by direction", "whole run", "per round", "per step"),
        ((name, *map(bytes_text, each)) for name, *each in sizes),
    )
    yield Text(f"\n{one_line(summary.privacy)}")
    if summary.sample:
        yield Text(f'\nit writes: "{one_line(summary.sample)}"')


def _headline(summary: Summary) -> RenderableType:
    figures = summary.headline
    grid = Table.grid(*("" for _ in figures), padding=(0, 3, 0, 0), expand=True)
    for column in grid.columns:
        column.ratio = 1
    grid.add_row(*(Text(each.name, style="dim") for each in figures))
    grid.add_row(*(Text.assemble((each.value, "bold"), " ", each.unit) for each in figures))
    grid.add_row(*(Text(each.note, style="dim") for each in figures))
    return Padding(grid, (1, 0, 0, 0))


def _table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = frozenset({0})
) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number in left else "right")
    for row in rows:
        # As Text, so that rich reads no markup in it.
        table.add_row(*(Text(one_line(cell)) for cell in row))
    return Padding(table, (1, 0, 0, 0))


def _round(stats: RoundStats) -> tuple[str, ...]:
    return (
        f"{stats.round}",
        f"{stats.loss:.4f}",
        stats.held_out.removeprefix("held-out "),
        duration_text(stats.seconds),
        bytes_text(stats.bytes_up),
        bytes_text(stats.bytes_down),
    )


def _client(client: ClientTotals) -> tuple[str, ...]:
    return (
        client.name,
        f"{client.share:.1%}",
        f"{client.tokens:,}",
        f"{client.steps:,}",
        "-" if math.isnan(client.loss) else f"{client.loss:.4f}",
        f"{client.repeated:,}",
        f"{client.refused:,}",
        f"{client.failed:,}",
    )
