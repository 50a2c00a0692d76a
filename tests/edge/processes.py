"""Real processes of a deployment: free ports for them, their start and end, and what is left."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
PATIENCE_S = 1200.0


@contextmanager
def marking(mark: str) -> Iterator[None]:
    """A mark in the environment that every process of the block inherits; none may be left."""
    os.environ["FEDSPLIT_TEST_MARK"] = mark
    yield
    del os.environ["FEDSPLIT_TEST_MARK"]
    assert marked(mark) == []


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            is_marked = process.environ().get("FEDSPLIT_TEST_MARK") == mark
            if is_marked and process.pid != os.getpid() and process.status() != "zombie":
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


@contextmanager
def background(*command: str, env: dict[str, str], cwd: Path) -> Iterator[None]:
    """A process that runs while the block does; its children go with it."""
    with (cwd / f"{command[0]}.log").open("ab") as log:
        process = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]
        process.terminate()
        process.wait(timeout=PATIENCE_S)
        psutil.wait_procs(family, timeout=PATIENCE_S)  # the others take a second more


def free_ports(number: int) -> list[int]:
    with ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def await_that(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
