"""Runs one experiment, or a sweep: composes the config, trains, prints rounds, writes a folder.

python -m simulations.run experiment=toy
python -m simulations.run -m sharding=natural,iid
python -m simulations.run experiment=convergence
python -m simulations.run --help
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import fedsplit.config
from fedsplit.config import Variants
from fedsplit.console import READER_GONE, ending_with_its_reader
from fedsplit.runs.compare import COLUMNS, Group, Table, plot, rows_of
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.metrics import closing_table
from fedsplit.spec import RunSpec
from simulations.experiments import convergence, noniid, straggler
from simulations.single import carry_out, claim
from simulations.sweep import carried_out

_POLL_S = 0.2
"""Seconds between two looks at the run's folder for new rounds."""


def _of_runs(table: Callable[[Sequence[Group]], Table]) -> Callable[[RunSpec, Variants], Table]:
    """Return a function that trains the runs that are not finished, and returns their table."""

    def trained_table(sweep: RunSpec, variants: Variants) -> Table:
        groups = carried_out(sweep, variants)
        plot(groups, Path(sweep.launch.run_dir, sweep.name))
        return table(groups)

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


# Here as well as at `main`, because Hydra catches errors in between and prints its own text.
@ending_with_its_reader()
def run_one(run: RunSpec) -> Path:
    """Run one experiment, print its rounds as they end, and return its folder."""
    run, folder = claim(run)
    print(_heading(run), flush=True)
    if run.resume:
        print(f"resumes after round {folder.last_checkpoint} in {folder.path}", flush=True)
    with _printing_rounds(folder):
        carry_out(run, folder)
    print(f"\n{closing_table(folder.rounds())}")
    print(f"\nleft in {folder.path}: {_left(folder.path)}", flush=True)
    return folder.path


def run_sweep(run: RunSpec, variants: Variants) -> None:
    """Run all variants and seeds of an experiment, and print its table."""
    folder = Path(run.launch.run_dir, run.name)
    print(f"experiment {run.name}: {len(variants)} variants, seeds {run.sweep.seeds}", flush=True)
    table = _TABLES[run.sweep.kind](run, variants)
    table.write(folder)
    print(f"\n{table}\n\nleft in {folder}: {_left(folder)}", flush=True)


@contextmanager
def _printing_rounds(folder: RunFolder) -> Iterator[None]:
    """Print each new round of the folder inside the block, from whichever process wrote it.

    Raises:
        BrokenPipeError: The output has no reader any more; the block was interrupted, as by Ctrl-C.
    """
    over = threading.Event()
    known = folder.rounds()
    broken_pipes: list[BrokenPipeError] = []

    def follow() -> None:
        while True:
            last_look = over.wait(_POLL_S)
            for stats in folder.rounds():
                # A resumed run trains some rounds again, so their number alone does not tell.
                if stats not in known:
                    print(stats.line, flush=True)
                    known.append(stats)
            if last_look:
                return

    def follow_while_read() -> None:
        try:
            follow()
        except BrokenPipeError as exc:
            broken_pipes.append(exc)
            # The block runs in the main thread, and only a signal interrupts it there.
            main_thread = threading.main_thread().ident
            assert main_thread is not None, "it has been started"
            signal.pthread_kill(main_thread, signal.SIGINT)

    thread = threading.Thread(target=follow_while_read, name="round-printer")
    thread.start()
    try:
        try:
            yield
        finally:
            # The thread looks once more after this, so the last rounds are printed too.
            over.set()
            thread.join()
    except KeyboardInterrupt:
        if broken_pipes:
            raise broken_pipes[0] from None
        raise


def _heading(run: RunSpec) -> str:
    return (
        f"run {run.name} ({run.fingerprint}): {run.model}, split {run.split}, "
        f"{run.data.kind} corpus, {run.sharding.kind} sharding over {run.clients} clients, "
        f"policy {run.policy.kind}, launch {run.launch.kind}"
    )


def _left(folder: Path) -> str:
    names = (f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    return " ".join(sorted(names))


@ending_with_its_reader()
def main() -> None:
    """Run the experiment or sweep of the command line."""
    done: list[Path] = []
    fedsplit.config.main(lambda run: done.append(run_one(run)), run_sweep)
    if len(done) > 1:
        print(f"\ncompare them: fedsplit compare {' '.join(map(str, done))}", flush=True)


if __name__ == "__main__":
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
