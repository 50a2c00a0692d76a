"""The commands of a run, each started again when it ends with an error, as systemd does."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from simulations.faults.hook.sitecustomize import VARIABLE, install

RESTART_S = 1.0
"""Seconds from the end of a command to its next start, if it was not killed."""
_SECONDS_TO_END = 20.0


@dataclass(slots=True, kw_only=True, eq=False)
class Service(ABC):
    """A command that runs until it ends without an error.

    Attributes:
        name: Its name.
        command: Its words.
        environment: Variables on top of this process's own.
        folder: Its working directory.
        log: The file of its output, of all its starts.
        starts: The number of its starts so far.
        exit_code: That of its last end, negative for a signal; None while it runs.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    folder: Path
    log: Path
    starts: int = 0
    exit_code: int | None = None
    _ended_at: float = field(default=0.0, init=False)

    @property
    @abstractmethod
    def pid(self) -> int:
        """The id of its last process."""

    @abstractmethod
    def _start(self) -> None:
        """Start a process of the command."""

    @abstractmethod
    def _poll(self) -> int | None:
        """Return the exit code of the process, or None while it runs."""

    def start(self) -> None:
        """Start the command."""
        self.starts += 1
        self.exit_code = None
        self._start()

    def tend(self, *, restart: bool) -> None:
        """Note the end of the command; with `restart`, start it again if it was an error."""
        if self.exit_code is None:
            self.exit_code = self._poll()
            self._ended_at = time.monotonic()
        if restart and self.exit_code:
            was_killed = self.exit_code < 0
            if was_killed or time.monotonic() > self._ended_at + RESTART_S:
                self.start()

    def stop(self) -> None:
        """End the command with SIGTERM, and with SIGKILL if that is not enough."""
        if not self.starts or self._poll() is not None:
            return
        process = psutil.Process(self.pid)
        with suppress(psutil.Error):
            process.terminate()
        deadline = time.monotonic() + _SECONDS_TO_END
        while self._poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        with suppress(psutil.Error):
            process.kill()
        while self._poll() is None:
            time.sleep(0.05)


@dataclass(slots=True, kw_only=True, eq=False)
class Program(Service):
    """A service that is a program of its own."""

    _process: "subprocess.Popen[bytes]" = field(init=False)

    @property
    def pid(self) -> int:
        """The id of its last process."""
        return self._process.pid

    def _start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                env={**os.environ, **self.environment},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _poll(self) -> int | None:
        return self._process.poll()


@dataclass(slots=True, kw_only=True, eq=False)
class ForkedModule(Service):
    """A service that is `python -m` in a process forked from one that has imported the libraries.

    Imports take seconds, and nothing else is different.
    """

    _process: BaseProcess = field(init=False)

    @property
    def pid(self) -> int:
        """The id of its last process."""
        assert self._process.pid, "it has been started"
        return self._process.pid

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        # Not the programs themselves: Python warns of a program that is imported when it runs.
        context.set_forkserver_preload(
            ["simulations.sweep", "fedsplit.flower.client_app", "fedsplit.flower.server_app"]
        )
        self._process = context.Process(
            target=_run, args=(self.command, self.environment, self.folder, self.log)
        )
        self._process.start()

    def _poll(self) -> int | None:
        return self._process.exitcode


def _run(command: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ.update(environment)
    # Python reads PYTHONPATH at the start of a process that is not forked.
    install(environment[VARIABLE])
    sys.argv = list(command)
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the processes that were started with the variable of a watcher's folder."""
    return [process for process in psutil.process_iter() if _belongs_to(process, folder)]


def _belongs_to(process: psutil.Process, folder: Path) -> bool:
    try:
        # A zombie has ended; in some containers no process reaps it.
        is_alive = process.status() != psutil.STATUS_ZOMBIE
        return bool(is_alive and process.environ().get(VARIABLE) == str(folder))
    except (psutil.Error, OSError):
        return False
