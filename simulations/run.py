"""Runs one experiment, or a sweep: composes the config, trains, prints rounds, writes a folder.

python -m simulations.run experiment=toy
python -m simulations.run -m sharding=natural,iid
python -m simulations.run experiment=convergence
python -m simulations.run --help
"""

import logging
import os
import shlex
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path

from fedsplit.config import CommandLine, Variants
from fedsplit.console import (
    READER_GONE,
    begin_log,
    ending_with_an_error_line,
    ending_with_its_reader,
)
from fedsplit.errors import Diverged
from fedsplit.runs.compare import COLUMNS, Group, Table, plot, rows_of
from fedsplit.runs.compare_report import write_comparison
from fedsplit.runs.folder import RunFolder
from fedsplit.spec import RunSpec
from simulations.experiments import convergence, noniid, straggler
from simulations.single import left_in, run_one
from simulations.sweep import carried_out


def _of_runs(table: Callable[[Sequence[Group]], Table]) -> Callable[[RunSpec, Variants], Table]:
    """Return a function that trains the runs that are not finished, and returns their table."""

    def trained_table(sweep: RunSpec, variants: Variants) -> Table:
        groups = carried_out(sweep, variants)
        folder = Path(sweep.launch.run_dir, sweep.name)
        plot(groups, folder)
        trained = table(groups)
        write_comparison(trained, groups, folder)
        return trained

    return trained_table


def _measured(sweep: RunSpec, variants: Variants) -> Table:
    from simulations.memory import measured  # imports torch, which takes seconds

    return measured(sweep, variants)


_TABLES: dict[str, Callable[[RunSpec, Variants], Table]] = {
    "compare": _of_runs(lambda groups: Table(rows=rows_of(groups), columns=COLUMNS)),
    "convergence": _of_runs(convergence.table),
    "straggler": _of_runs(straggler.table),
    "noniid": _of_runs(noniid.table),
    "memory": _measured,
}
"""The table of an experiment, by `sweep.kind`."""


def run_sweep(run: RunSpec, variants: Variants) -> None:
    """Run all variants and seeds of an experiment, and print its table.

    Raises:
        Diverged: A variant has a run that failed; the table has the others.
    """
    folder = Path(run.launch.run_dir, run.name)
    print(f"experiment {run.name}: {len(variants)} variants, seeds {run.sweep.seeds}", flush=True)
    table = _TABLES[run.sweep.kind](run, variants)
    table.write(folder)
    print(f"\n{table}\n\nleft in {folder}: {left_in(folder)}", flush=True)
    rows = {row["name"] for row in table.rows}
    if failed := [name for name in variants if name not in rows]:
        raise Diverged(f"variants with a run that failed: {', '.join(failed)}")


def main() -> None:
    """Run the experiment or sweep of the command line.

    Raises:
        SystemExit: It failed; the status is 1, or `READER_GONE` if the output was closed.
    """
    with ending_with_an_error_line(debug="--debug" in sys.argv), ending_with_its_reader():
        # Before the rest is read, which may have something to log.
        options = ArgumentParser(add_help=False, allow_abbrev=False)
        options.add_argument("--log-format", default="")
        options.add_argument("--log-level", default="")
        log, arguments = options.parse_known_args()
        begin_log("warning", form=log.log_format, level=log.log_level)
        line = CommandLine.read(arguments)
        if line.variants:
            run_sweep(line.runs[0], line.variants)
            return
        before = _folders(line.runs)
        line.launch(run_one)
        # Found in the file system, because jobs may run in other processes.
        new = _folders(line.runs) - before
        if line.is_sweep and len(new) > 1:
            print(f"\ncompare them: fedsplit compare {shlex.join(sorted(new))}", flush=True)


def _folders(runs: Sequence[RunSpec]) -> set[str]:
    """Return the finished runs in the folders that these runs are written to."""
    parents = {Path(run.launch.run_dir).resolve() for run in runs}
    folders = (folder for parent in parents if parent.is_dir() for folder in parent.iterdir())
    return {str(folder) for folder in folders if RunFolder(folder).is_finished}


def _interrupt(*_: object) -> None:
    # The trunk ends before its clients, whose warnings about it would follow.
    logging.disable()
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _interrupt)
    # `os._exit`, because a plain exit waits for clients, which may wait for a trunk that has ended.
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)
    except SystemExit as end:
        if end.code == READER_GONE:
            os._exit(READER_GONE)
        raise
