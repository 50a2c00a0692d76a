"""Carries out the runs of an experiment in several processes, except runs that are finished."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from fedsplit.config import Variants, from_yaml, to_yaml
from fedsplit.errors import DataError, Diverged, error_text
from fedsplit.flower.processes import SECONDS_TO_END
from fedsplit.runs.compare import Group, Run, number
from fedsplit.runs.folder import RunFolder
from fedsplit.spec import RunSpec
from simulations.single import carry_out, claim

_PRELOADED = ["fedsplit.flower.client_app", "fedsplit.flower.server_app", __name__]
"""Imported once for the processes of all runs, because the imports take seconds."""
_SECONDS_TO_END = 3 * SECONDS_TO_END
"""Seconds that a run has to end, and with it the processes of its SuperLink."""


def carried_out(sweep: RunSpec, variants: Variants) -> list[Group]:
    """Train the runs that are not finished, print a line for each, and return all by variant.

    A finished run is found by its fingerprint, so a sweep that was interrupted resumes. A variant
    with a run that failed is left out.

    Raises:
        Diverged: Every variant has a run that failed.
    """
    jobs = [run for runs in variants.values() for run in runs]
    found = {run.name: finished for run in jobs if (finished := _finished(run))}
    if found:
        print(f"{len(found)} of {len(jobs)} runs are there already", flush=True)
    failures = {}
    for run, error in _trained([run for run in jobs if run.name not in found], sweep):
        if finished := _finished(run):
            found[run.name] = finished
        else:
            failures[run.name] = error or "it left no finished run"
        print(
            _line(finished) if finished else f"{run.name} failed: {failures[run.name]}", flush=True
        )
    groups = []
    for name, runs in variants.items():
        if failed := [run.name for run in runs if run.name not in found]:
            print(f"{name} is left out, because {failed[0]} failed", flush=True)
        else:
            groups.append(Group(name=name, runs=[found[run.name] for run in runs]))
    if not groups:
        raise Diverged(f"no variant of {sweep.name} finished: {next(iter(failures.values()))}")
    return groups


def _finished(run: RunSpec) -> Run | None:
    """Return the finished run with the same settings; None if there is none."""
    # A name that was taken gets a number, so all folders that begin with the name are candidates.
    for path in sorted(Path(run.launch.run_dir).glob(f"{run.name}*")):
        if RunFolder(path).is_finished and not RunFolder(path).divergence:
            with suppress(DataError):
                finished = Run.read(path)
                if finished.spec.fingerprint == run.fingerprint:
                    return finished
    return None


def _line(run: Run) -> str:
    bits = number(run.held_out("bits_per_byte")[-1])
    return f"{run.path.name:<32}  {bits:>8} bits/byte  {run.total('seconds'):>7.1f} s"


def _trained(runs: Sequence[RunSpec], sweep: RunSpec) -> Iterator[tuple[RunSpec, str]]:
    """Train several runs at a time, and yield each at its end with its error (empty for none)."""
    cores = os.cpu_count() or 1
    at_once = sweep.sweep.at_once or cores
    waiting, working = list(runs), dict[Any, _Work]()
    try:
        while waiting or working:
            while waiting and len(working) < at_once:
                work = _Work.begin(waiting.pop(0), num_threads=max(1, cores // at_once))
                working[work.answer] = work
            for answer in connection.wait(list(working)):
                work = working.pop(answer)
                yield work.run, work.error()
    finally:
        # After an error or Ctrl-C, no run must continue without its sweep. SIGTERM first, so that a
        # run on a SuperLink ends its processes.
        for work in working.values():
            work.process.terminate()
        for work in working.values():
            work.process.join(timeout=_SECONDS_TO_END)
            work.process.kill()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """A run in a process of its own, and the pipe over which the process reports the end."""

    run: RunSpec
    process: ForkServerProcess
    answer: "Connection[bytes, bytes]"

    @staticmethod
    def begin(run: RunSpec, num_threads: int) -> "_Work":
        # Not fork: torch's threads do not survive it. Not spawn: each would import for seconds.
        context = get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        answer, sender = context.Pipe(duplex=False)
        arguments = (to_yaml(run), num_threads, sender)
        process = context.Process(target=_train, args=arguments, daemon=True)
        process.start()
        # With the process's copy alone left open, its end closes the pipe.
        sender.close()
        return _Work(run=run, process=process, answer=answer)

    def error(self) -> str:
        """Return why the run failed; empty if it did not."""
        with self.answer:
            try:
                error = self.answer.recv_bytes().decode()
            except EOFError:
                error = "its process ended before the run did"
        self.process.join()
        return error


def _train(config: str, num_threads: int, sender: "Connection[bytes, bytes]") -> None:
    import torch  # not in the process that starts the runs

    # Ctrl-C ends the process at once; a KeyboardInterrupt would wait for the run's clients.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(num_threads)
    error = ""
    try:
        carry_out(*claim(from_yaml(config)))
    except Exception as exc:
        error = error_text(exc)
    sender.send_bytes(error.encode())


def _end_with_parent() -> None:
    """End this process when its parent ends, which may be killed before it can end its children."""
    parent = parent_process()
    assert parent is not None, "only a child process comes here"
    parent.join()
    # Ends a run in this process at once, and a run on a SuperLink after its processes.
    os.kill(os.getpid(), signal.SIGTERM)
