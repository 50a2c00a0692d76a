"""Strikes a process of a run at a point, and waits for the run to end by itself."""

import re
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import psutil

from simulations.faults.points import POINTS, PROGRESS
from simulations.faults.services import Service, processes_of
from simulations.faults.watcher import Passage, watching
from simulations.faults.ways import WAYS, Way, runs_in

FROZEN_S = 3.0
"""Seconds that a frozen process stands still."""
_PATIENCE_S = 400.0
_SECONDS_TO_END = 10.0
_LINES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A fault: what is done to which process, when a run is at a point.

    Attributes:
        way: The way of use.
        point: The name of the point.
        victim: The role of the process; "run" is the one process of an inline run.
        action: SIGKILL, or SIGSTOP and SIGCONT `FROZEN_S` seconds later.
        nth: The number of the passage of the point, in all processes together.
        after: Passages count from the server's checkpoint of this round or version on; 0: from the
            start.
    """

    way: str
    point: str
    victim: str
    action: Literal["kill", "freeze"] = "kill"
    nth: int = 1
    after: int = 1

    def __str__(self) -> str:
        when = f"{self.point} {self.nth}" if self.nth > 1 else self.point
        return f"{self.way}: {self.action} {self.victim} at {when}, after round {self.after}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a run.

    Attributes:
        why: Why it is not as it must be, with the last lines of its logs; empty if it is.
        weights: The sha256 of the bytes of each tensor of its result; empty without one.
        struck_s: Seconds from its start to the fault; NaN without one.
        recovery_s: The longest time without progress from the fault on, including the time that a
            process stood still.
        load_s: Seconds from the start of the process with the trunk to its first step.
        restarts: The number of starts of services after the first ones.
        leftover: The number of processes that were there after its end.
    """

    why: str
    weights: dict[str, str]
    struck_s: float
    recovery_s: float
    load_s: float
    restarts: int
    leftover: int


def run_with(way_name: str, case: Case | None) -> Outcome:
    """Run the tiny experiment in a way of use to its end, with or without a fault."""
    # The path of a Unix socket has at most 103 bytes, and $TMPDIR may be long.
    with TemporaryDirectory(prefix="faults-", dir="/tmp", ignore_cleanup_errors=True) as name:
        return _Trial(WAYS[way_name], case, Path(name)).outcome()


@dataclass(slots=True, kw_only=True)
class _Record:
    """What happened to a run: times are in monotonic seconds."""

    started: float = field(default_factory=time.monotonic)
    struck: float = float("nan")
    progress: list[float] = field(default_factory=list)
    load_s: float = float("nan")
    problem: str = ""


class _Trial:
    """One run, in a folder of its own."""

    def __init__(self, way: Way, case: Case | None, folder: Path) -> None:
        self._way = way
        self._case = case
        self._folder = folder
        self._record = _Record()
        self._num_passages = 0
        self._killed = 0
        self._services: Sequence[Service] = ()

    def outcome(self) -> Outcome:
        points = {POINTS[name] for name in PROGRESS}
        if self._case:
            points.add(POINTS[self._case.point])
        with watching(self._folder, points, self._on_passage):
            self._services = self._way.services(self._folder)
            try:
                self._follow()
            finally:
                leftover = self._clean_up()
        return self._judged(leftover)

    # --- the run ----------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Start the services, and start again those that end, until the run is over."""
        for service in self._services:
            service.start()
        run = self._services[-1]
        deadline = time.monotonic() + _PATIENCE_S
        while run.exit_code != 0 and not self._record.problem:
            for service in self._services:
                service.tend(restart=self._is_managed(service))
            if run.exit_code and not self._is_managed(run):
                self._record.problem = f"the run ended by itself with exit code {run.exit_code}"
            if time.monotonic() > deadline:
                self._record.problem = f"the run did not end within {_PATIENCE_S:g} s"
            time.sleep(0.02)

    def _is_managed(self, service: Service) -> bool:
        """Return whether a service manager starts a service again if it ends now."""
        is_struck = self._record.struck == self._record.struck
        run_was_struck = is_struck and self._case and self._case.victim == self._way.run
        return service is not self._services[-1] or bool(run_was_struck)

    def _clean_up(self) -> int:
        """End all services; return the number of processes that are left, and kill them."""
        for service in reversed(self._services):
            service.stop()
        deadline = time.monotonic() + _SECONDS_TO_END
        while (left := processes_of(self._folder)) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        return len(left)

    # --- the fault --------------------------------------------------------------------------------

    def _on_passage(self, passage: Passage) -> None:
        record, case = self._record, self._case
        if self._killed == passage.pid:  # it called before it was killed
            return
        if passage.point in PROGRESS:
            record.progress.append(time.monotonic())
            if len(record.progress) == 1:
                with suppress(psutil.Error):
                    record.load_s = time.time() - psutil.Process(passage.pid).create_time()
        if case and passage.point == case.point and record.struck != record.struck:
            self._num_passages += self._has_checkpoint(case.after)
            if self._num_passages == case.nth:
                self._strike(case, passage.pid)

    def _has_checkpoint(self, number: int) -> bool:
        # The name of a round has four digits, so names are in the order of rounds.
        rounds = self._folder.glob(self._way.checkpoints)
        return not number or any(each.parent.name >= f"round-{number:04d}" for each in rounds)

    def _strike(self, case: Case, pid: int) -> None:
        self._record.struck = time.monotonic()
        victims = self._processes_as(case.victim)
        if not victims:
            self._record.problem = f"no process is a {case.victim} at this point"
            return
        # Of several, the one at the point.
        victim = next((each for each in victims if each.pid == pid), victims[0])
        if case.action == "kill":
            self._killed = victim.pid
            victim.kill()
            # Not `wait`, which would take the exit code from the service that started it.
            while _runs(victim):
                time.sleep(0.001)
            return
        victim.suspend()
        timer = threading.Timer(FROZEN_S, self._resume, [victim])
        timer.daemon = True
        timer.start()

    @staticmethod
    def _resume(victim: psutil.Process) -> None:
        with suppress(psutil.Error):
            victim.resume()

    def _processes_as(self, role: str) -> list[psutil.Process]:
        # A process that was forked has the command line of the other one.
        if role not in self._way.roles:
            return [psutil.Process(self._services[-1].pid)]
        pattern = re.compile(self._way.roles[role])
        found = []
        for process in processes_of(self._folder):
            with suppress(psutil.Error):
                if pattern.search(" ".join(process.cmdline())):
                    found.append(process)
        return found

    # --- the judgment -----------------------------------------------------------------------------

    def _judged(self, leftover: int) -> Outcome:
        record = self._record
        tensors, problem = self._way.result(self._folder)
        problem = record.problem or problem
        if self._case and record.struck != record.struck:
            problem = problem or "the point was not reached"
        if leftover and not problem:
            problem = f"{leftover} processes are left"
        times = [record.struck, *(each for each in record.progress if each > record.struck)]
        gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
        return Outcome(
            why=f"{problem}\n{self._last_lines()}" if problem else "",
            weights={k: sha256(t.numpy().tobytes()).hexdigest() for k, t in tensors.items()},
            struck_s=record.struck - record.started,
            recovery_s=max(gaps, default=0.0),
            load_s=record.load_s,
            restarts=sum(service.starts for service in self._services) - len(self._services),
            leftover=leftover,
        )

    def _last_lines(self) -> str:
        texts = []
        for path in [*self._folder.glob("*.log"), *runs_in(self._folder).glob("*/*.log")]:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            texts.append("\n".join([f"[{path.name}]", *lines[-_LINES:]]))
        return "\n".join(texts)


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False
