"""Carries out one run, in this process or in Flower's processes.

The modules that train are imported only for a run in this process, because importing takes seconds.
"""

import logging
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from fedsplit.config import to_yaml
from fedsplit.console import ending_with_its_reader
from fedsplit.runs.folder import RunFolder, new_run_id
from fedsplit.runs.metrics import evaluated
from fedsplit.runs.next_commands import next_commands
from fedsplit.spec import RunSpec
from fedsplit.telemetry.sinks import Sink
from simulations.launch import run_flwr
from simulations.progress import ProgressBar, progress_on

_APP = Path(__file__).resolve().parent.parent
# Reading the data imports for seconds. Fewer clients of a SuperLink report its errors as soon.
_MANY_CLIENTS = 1000
_POLL_S = 0.2
"""Seconds between two looks at the run's folder for new rounds."""


def run_one(run: RunSpec) -> float:
    """Run one experiment, and print its rounds as they end.

    Launchers of Hydra pickle this function for their processes, by its name in this module.

    Returns:
        The best held-out loss, which a sweeper can minimize; NaN if it was not measured.

    Raises:
        FedsplitError: The run failed.
        SystemExit: The reader of the output has closed it.
    """
    # Here as well as in the program, because Hydra catches errors in between and prints its text.
    with ending_with_its_reader():
        if finished := RunFolder.finished_as(run):
            run, folder = replace(run, name=finished.path.name), finished
            print(_heading(run))
            print(f"{folder.path} is finished already; leave resume out to train again")
        else:
            run, folder = _carried_out(run)
        print(f"\n{_printable(folder.closing_table())}")
        if run.privacy.audit == "end":
            print(_audited(folder))
        print(f"\nleft in {folder.path}: {left_in(folder.path)}")
        for what, command in next_commands(run, folder):
            print(f"{what}: {command}", flush=True)
        return min(stats.eval_loss for stats in evaluated(folder.rounds()))


def _carried_out(asked: RunSpec) -> tuple[RunSpec, RunFolder]:
    """Train the run that was asked for; return it under its folder's name, and the folder."""
    run, folder = claim(asked)
    print(_heading(run), flush=True)
    if run.resume:
        print(f"resumes after round {folder.last_checkpoint} in {folder.path}", flush=True)
    elif run.name != asked.name:
        print(_why_renamed(asked, folder), flush=True)
    with _progress(run, folder) as (say, sinks), _printing_rounds(folder, say):
        carry_out(run, folder, sinks)
    return run, folder


@contextmanager
def _progress(
    run: RunSpec, folder: RunFolder
) -> Iterator[tuple[Callable[[str], None], Sequence[Sink]]]:
    """Show a progress bar if the run is one in this process, and the output is a terminal.

    Yields:
        A function that prints a line, above the bar if there is one, and the sinks of the bar.
    """
    console = Console()
    # Jobs of a launcher, which are processes beside each other, have one terminal together.
    alone = multiprocessing.parent_process() is None
    if run.launch.kind != "inline" or not alone or not console.is_interactive:
        yield partial(print, flush=True), ()
        return
    with progress_on(console) as progress:
        done = folder.last_checkpoint if run.resume else 0
        # A terminal wraps long lines by itself.
        say = partial(progress.console.print, soft_wrap=True, markup=False, highlight=False)
        yield say, [ProgressBar(progress, run, done)]


def _audited(folder: RunFolder) -> str:
    """Measure what a server reads of the run; return the line about it."""
    from fedsplit.audit.report import audit
    from fedsplit.runs.report import write_report

    found = audit(folder, quick=True, noise=[folder.run.privacy.z])
    found.write(folder.path / "audit")
    found.add_to_card(folder.model / "README.md")
    # It has the line about the leak too.
    write_report(folder)
    return found.leak


def _printable(text: str) -> str:
    # The sample may have any character, and the run has its result already.
    encoding = sys.stdout.encoding
    return text.encode(encoding, "replace").decode(encoding)


def _why_renamed(asked: RunSpec, folder: RunFolder) -> str:
    earlier = RunFolder(folder.path.with_name(asked.name))
    state = "is finished" if earlier.is_finished else "has no result"
    resume = "nothing to resume: " if asked.resume else ""
    return f"{resume}{earlier.path} {state}, so a new run begins in {folder.path}"


def left_in(folder: Path) -> str:
    """Return the names in a folder as one text."""
    names = (f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    return " ".join(sorted(names))


@contextmanager
def _printing_rounds(folder: RunFolder, say: Callable[[str], None]) -> Iterator[None]:
    """Print each new round of the folder inside the block, from whichever process wrote it.

    Raises:
        BrokenPipeError: The output has no reader any more; the block was interrupted, as by Ctrl-C.
    """
    over = threading.Event()
    known = folder.rounds()
    broken_pipes: list[BrokenPipeError] = []

    def follow() -> None:
        size = -1
        while True:
            last_look = over.wait(_POLL_S)
            # With many clients, a file that has not grown takes long to read again.
            file = folder.metrics.path
            before, size = size, file.stat().st_size if file.exists() else 0
            for stats in folder.rounds() if size != before else []:
                # A resumed run trains some rounds again, so their number alone does not tell.
                if stats not in known:
                    say(stats.line)
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
        f"{run.data.kind} corpus, special tokens {run.data.special_tokens}, "
        f"{run.sharding.kind} sharding over {run.clients} clients, "
        f"policy {run.policy.kind}, launch {run.launch.kind}"
    )


def claim(run: RunSpec) -> tuple[RunSpec, RunFolder]:
    """Claim a folder for the run, or take that of the run it resumes.

    Returns:
        The run under the folder's name, and the folder.

    Raises:
        DataError: The data is not enough for the clients; raised before they are made.
    """
    if run.launch.kind == "inline" or run.clients > _MANY_CLIENTS:
        from fedsplit.flower.share import partitions_of

        # Clients in this process get these, so nothing is read twice.
        partitions_of(run.data, run.task, run.sharding, run.clients, run.seed)
    resumed = RunFolder.to_resume(run)
    if resumed:
        # Refused here, before this process writes its log into the folder of a run in progress.
        with resumed.held():
            pass
    folder = resumed or RunFolder.claim(Path(run.launch.run_dir), run.name)
    launch = replace(run.launch, run_dir=str(folder.path.parent))
    resume = str(folder.path) if resumed else ""
    return replace(run, name=folder.path.name, resume=resume, launch=launch), folder


def carry_out(run: RunSpec, folder: RunFolder, sinks: Sequence[Sink] = ()) -> None:
    """Train a run, and remove its folder if nothing was written to it.

    Args:
        run: The run, under the folder's name.
        folder: The folder that `claim` returned.
        sinks: Get the events of a run in this process.

    Raises:
        FedsplitError: The run failed.
    """
    try:
        if run.launch.kind == "inline":
            _inline(run, folder, sinks)
        else:
            _flwr(run, folder)
    finally:
        folder.give_back()


def _inline(run: RunSpec, folder: RunFolder, sinks: Sequence[Sink]) -> None:
    from fedsplit.console import quiet_libraries

    # First, because some libraries warn when they are imported.
    quiet_libraries()
    from fedsplit.flower import client_app, server_app
    from fedsplit.flower.inline import run_inline

    # The program prints each round itself.
    logging.getLogger("flwr").setLevel(logging.WARNING)
    try:
        run_inline(
            server_app.app_with(*sinks),
            client_app.app,
            num_clients=run.num_nodes,
            run_config=_run_config(run, folder),
            workers=run.launch.workers,
        )
    finally:
        # Programs that go on after a run, such as sweeps, need the memory.
        client_app.PROTOTYPE.clear()


def _flwr(run: RunSpec, folder: RunFolder) -> None:
    address = ""
    if run.launch.ray_address:
        from simulations.ray_cluster import RayCluster  # imports Ray, which takes seconds

        cluster = RayCluster.found_at(run.launch.ray_address)
        cluster.require(run.num_nodes)
        run, address = cluster.reachable(run), cluster.address
    with (folder.path / "flower.log").open("w", encoding="utf-8") as log:

        def write(line: str) -> None:
            # Without room on the disk, the log has a gap, and the run goes on.
            with suppress(OSError):
                print(line, file=log, flush=True)

        run_flwr(
            _APP,
            folder,
            # The id lets the app continue the run when it is started again. A resumed run has one.
            run_config=_run_config(run, folder) | {"run-id": "" if run.resume else new_run_id()},
            num_clients=run.num_nodes,
            workers=run.launch.workers,
            ray_address=address,
            restarts=run.launch.restarts,
            start_timeout_s=run.launch.start_timeout_s,
            on_output=write,
            on_restart=lambda line: print(line, flush=True),
        )


def _run_config(run: RunSpec, folder: RunFolder) -> dict[str, str]:
    return {"config": to_yaml(run), "run-dir": str(folder.path.parent)}
