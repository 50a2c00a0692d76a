"""Commands for the folders and the data of runs: plot, report, watch, compare and shards."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from fedsplit.cli.command import Command
from fedsplit.errors import one_line


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot(Command):
    """Plot the loss of a run."""

    example: ClassVar[str] = "runs/default"

    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="the folder of a run")]

    def run(self) -> None:
        """Write `loss.png` into the run's folder."""
        from fedsplit.runs.folder import RunFolder
        from fedsplit.runs.loss_plot import plot_losses

        print(plot_losses(RunFolder(Path(self.run_dir))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Report(Command):
    """Write the report of a run, also of one that was stopped."""

    example: ClassVar[str] = "runs/default"

    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="the folder of a run")]

    def run(self) -> None:
        """Write `report.html` into the run's folder."""
        from fedsplit.runs.folder import RunFolder
        from fedsplit.runs.report import write_report

        print(write_report(RunFolder(Path(self.run_dir))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline(Command):
    """Draw where a step spends its time, from the traces of all processes."""

    example: ClassVar[str] = "traces"

    paths: Annotated[
        list[str],
        typer.Argument(metavar="FILE|DIR...", help="files of traces, or folders of them"),
    ]
    trace: Annotated[
        str,
        typer.Option(
            metavar="ID", help="the trace, or how its id begins; default the longest step"
        ),
    ] = ""
    out: Annotated[str, typer.Option(metavar="FILE", help="the picture: .png, .svg or .pdf")] = (
        "timeline.png"
    )

    def run(self) -> None:
        """Draw a trace, and print how long each kind of span took in all of them."""
        from fedsplit.console import table_text
        from fedsplit.runs.timeline import SKEW_MS, Traces, draw, skew_ms

        traces = Traces(map(Path, self.paths))
        spans = traces.of(self.trace)
        told = draw(spans, Path(self.out))
        print(f"{len(traces)} traces")
        print(table_text(traces.rows, right=range(2, 6)))
        print(f"{self.out}: {told}")
        if (behind_ms := skew_ms(spans)) > SKEW_MS:
            print(f"the server's clock is at least {behind_ms:.0f} ms behind the client's")


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch(Command):
    """Show the figures of a run in the terminal while it trains."""

    example: ClassVar[str] = "runs/default"

    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="the folder of a run")]

    def run(self) -> None:
        """Show the figures until the run has ended; in a pipe, print them once."""
        from rich.console import Console

        from fedsplit.runs.folder import RunFolder
        from fedsplit.runs.live import watch

        watch(RunFolder(Path(self.run_dir)), Console(highlight=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class Compare(Command):
    """Compare runs in a table, a plot and a report."""

    example: ClassVar[str] = "runs/default runs/default-2 --out compared"

    run_dirs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_DIR...", help="the folder of a run, or a folder of such folders"
        ),
    ]
    out: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="folder for table.json, compare.png and report.html; default compare/ beside the "
            "first run",
        ),
    ] = ""

    def run(self) -> None:
        """Print the table, and write it, the plot and the report to `out`."""
        from fedsplit.runs.compare import COLUMNS, Table, grouped, plot, read_runs, rows_of
        from fedsplit.runs.compare_report import write_comparison

        groups = grouped(read_runs(map(Path, self.run_dirs)))
        table = Table(rows=rows_of(groups), columns=COLUMNS)
        out = Path(self.out or os.path.normpath(Path(self.run_dirs[0], "..", "compare")))
        files = table.write(out), plot(groups, out), write_comparison(table, groups, out)
        print(table, "", *files, sep="\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards(Command):
    """Show how the data of a run is partitioned among its clients."""

    example: ClassVar[str] = "sharding=dirichlet sharding.alpha=0.1 clients=8 --out shards"

    overrides: Annotated[
        list[str],
        typer.Argument(
            default_factory=list,
            show_default=False,
            metavar="[OVERRIDE]...",
            help="group=option or field=value, as python -m simulations.run --help lists them",
        ),
    ]
    out: Annotated[
        str, typer.Option(metavar="DIR", help="folder for shards.png and shards.json")
    ] = ""

    def run(self) -> None:
        """Print the table, and write it and a plot to `out` if it is given."""
        from fedsplit import atomic
        from fedsplit.config import compose
        from fedsplit.data import hold_out, load_corpus, shard
        from fedsplit.runs.shard_stats import RunPartitions

        run = compose(self.overrides)
        # The same seed as in a run, so these are the run's shards.
        corpus, _ = hold_out(load_corpus(run.data, run.task), run.data.held_out, run.seed)
        partitions = RunPartitions.of(shard(corpus, run.sharding, run.clients, run.seed))
        title = f"{corpus.name}, sharding={run.sharding.kind}, seed={run.seed}"
        print(f"{one_line(title)}\n\n{partitions.table}")
        if left_out := corpus.num_bytes - partitions.total.bytes:
            print(f"{left_out:,} bytes are left out by {run.sharding.target}")
        if not self.out:
            return
        out = Path(self.out)
        atomic.make_folder(out)
        atomic.write_text(out / "shards.json", partitions.json)
        partitions.plot(out / "shards.png", title)
        print(f"\n{out / 'shards.png'}\n{out / 'shards.json'}")
