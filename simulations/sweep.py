"""Carries out the runs of an experiment: some at once, and each only if it is not there yet."""

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
from fedsplit.errors import DataError, Diverged, FedsplitError
from fedsplit.runs.compare import Group, Run, number
from fedsplit.runs.folder import RunFolder
from fedsplit.spec import RunSpec
from simulations.single import carry_out, claim

_PRELOADED = ["fedsplit.flower.client_app", "fedsplit.flower.server_app", __name__]
"""Imported once for the processes of all runs, as it takes seconds."""


def carried_out(sweep: RunSpec, variants: Variants) -> list[Group]:
    """The runs of each variant, finished; prints a line for each that had to be trained.

    A finished run is found again by its fingerprint, so what was interrupted goes on where it
    stopped. A variant of which a run fails is left out.

    Raises:
        Diverged: No variant is left.
    """
    jobs = [run for runs in variants.values() for run in runs]
    found = {run.name: there for run in jobs if (there := _finished(run))}
    if found:
        print(f"{len(found)} of {len(jobs)} runs are there already", flush=True)
    failures = {}
    for run, error in _trained([run for run in jobs if run.name not in found], sweep):
        if there := _finished(run):
            found[run.name] = there
        else:
            failures[run.name] = error or "it left no finished run"
        print(_line(there) if there else f"{run.name} failed: {failures[run.name]}", flush=True)
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
    """The finished run of the same settings, under this run's name with or without a number."""
    for path in sorted(Path(run.launch.run_dir).glob(f"{run.name}*")):
        if RunFolder(path).is_finished:
            with suppress(DataError):
                there = Run.read(path)
                if there.spec.fingerprint == run.fingerprint:
                    return there
    return None


def _line(run: Run) -> str:
    bits = number(run.held_out("bits_per_byte")[-1])
    return f"{run.path.name:<32}  {bits:>8} bits/byte  {run.total('seconds'):>7.1f} s"


def _trained(runs: Sequence[RunSpec], sweep: RunSpec) -> Iterator[tuple[RunSpec, str]]:
    """Train, some runs at a time; yields each that is over, and why it failed if it did."""
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
        for work in working.values():
            work.process.kill()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """A run that is trained in a process of its own, and where that answers when it is over."""

    run: RunSpec
    process: ForkServerProcess
    answer: "Connection[bytes, bytes]"

    @staticmethod
    def begin(run: RunSpec, num_threads: int) -> "_Work":
        context = get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        answer, sender = context.Pipe(duplex=False)
        arguments = (to_yaml(run), num_threads, sender)
        process = context.Process(target=_train, args=arguments, daemon=True)
        process.start()
        sender.close()
        return _Work(run=run, process=process, answer=answer)

    def error(self) -> str:
        """Why it failed; nothing if it did not."""
        with self.answer:
            try:
                told = self.answer.recv_bytes().decode()
            except EOFError:
                told = "its process ended before the run did"
        self.process.join()
        return told


def _train(config: str, num_threads: int, sender: "Connection[bytes, bytes]") -> None:
    import torch  # not in the process that starts all of them

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(num_threads)
    error = ""
    try:
        carry_out(*claim(from_yaml(config)))
    except FedsplitError as exc:
        error = str(exc)
    sender.send_bytes(error.encode())


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "only a child process comes here"
    parent.join()
    os._exit(1)
