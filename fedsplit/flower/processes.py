"""The processes of a run on this machine: finds those with its FLWR_HOME, and ends them.

`python -m fedsplit.flower.processes HOME` ends them, and removes HOME, when its standard input is
closed. A launcher that holds the other end of this pipe thus leaves no process, however it ends.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

CLIENT = "a client"
SERVER_APP = "flwr-serverapp"
"""The program of a ServerApp that is not simulated."""
ROLES = {
    "flower-superlink": "the SuperLink",
    "flower-superexec": "the SuperExec",
    "flwr-simulation": "the simulation",
    "gcs_server": "Ray's head",
    "raylet": "Ray's raylet",
    "ray::ClientAppActor": CLIENT,
    "ray::ClientAppActor.run": CLIENT,
}
"""What a simulated run needs until its end, most important first, by the name of the program."""
SECONDS_TO_END = 5.0
"""Seconds that processes have to end after SIGTERM, and again after SIGKILL."""
_POLL_S = 0.05


def roles_of(home: Path) -> Mapping[int, str]:
    """Return the processes of a run that it needs until its end: their roles by process id."""
    found: dict[int, str] = {}
    parents = {}
    for process in _of_run(home):
        with suppress(psutil.Error):
            # A script stands after its interpreter.
            names = {Path(word).name for word in process.cmdline()[:2]}
            for name in names & ROLES.keys():
                # First, since a process that ends meanwhile has no parent, and no role.
                parents[process.pid] = process.ppid()
                found[process.pid] = ROLES[name]
    # A child has the command line of its parent until it executes another program.
    return {pid: role for pid, role in found.items() if role != found.get(parents[pid])}


def process_with(file: Path, program: str) -> int | None:
    """Return the process id of the program that has a file open; None if this user sees none."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if program in {Path(word).name for word in process.cmdline()[:2]} and any(
                opened.path == str(file) for opened in process.open_files()
            ):
                pid: int = process.pid
                return pid
    return None


def is_alive(pid: int) -> bool:
    """Return whether a process has not ended."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def end_all(home: Path, *, gently: bool = True) -> None:
    """End every process of a run, and those of their sessions.

    Args:
        home: The FLWR_HOME of the run, which no other run has.
        gently: Whether SIGTERM precedes SIGKILL.
    """
    sessions: set[int] = set()
    stops: tuple[Callable[[psutil.Process], None], ...] = (psutil.Process.kill,)
    if gently:
        stops = (psutil.Process.terminate, *stops)
    for stop in stops:
        deadline = time.monotonic() + SECONDS_TO_END
        signaled: set[int] = set()
        while (alive := _of_run(home, sessions)) and time.monotonic() < deadline:
            # In every turn, because a process may have started another one meanwhile.
            for process in alive:
                if process.pid not in signaled:
                    with suppress(psutil.Error):
                        stop(process)
                    signaled.add(process.pid)
            time.sleep(_POLL_S)


def _of_run(home: Path, sessions: set[int] | None = None) -> list[psutil.Process]:
    """Return the processes with this FLWR_HOME, or in one of the sessions; adds to the sessions."""
    found = []
    for process in psutil.process_iter():
        try:
            session = os.getsid(process.pid)
            is_of_run = process.environ().get("FLWR_HOME") == str(home)
            if sessions is not None:
                # Its session outlives it, and has processes with another environment.
                if is_of_run and session != os.getsid(0):
                    sessions.add(session)
                is_of_run |= session in sessions
            # A zombie has ended; in some containers no process reaps it.
            if is_of_run and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (OSError, psutil.Error):
            continue
    return found


def main() -> None:
    """Wait for the end of standard input, then end the run of the FLWR_HOME that is given."""
    home = Path(sys.argv[1])
    sys.stdin.buffer.read()
    end_all(home, gently=False)
    shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
