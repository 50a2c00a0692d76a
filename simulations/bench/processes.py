"""The processes of a benchmark: each answers calls from the process that started it, as JSON.

A process runs a context manager, its role, which yields the functions that answer calls by name.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from fedsplit.console import quiet_libraries
from fedsplit.errors import Internal

Answers = Mapping[str, Callable[..., Any]]
Role = Callable[..., AbstractContextManager[Answers]]


class Process:
    """The handle of a process in the process that started it."""

    def __init__(self, pipe: "Connection[bytes, bytes]") -> None:
        self._pipe = pipe

    def ask(self, name: str, *values: Any) -> Any:
        """Call the answer of this name with JSON values, and return its result.

        Raises:
            Internal: The process has failed.
        """
        self.begin(name, *values)
        return self.end()

    def begin(self, name: str, *values: Any) -> None:
        """Call an answer without waiting; `end` returns the result."""
        self._pipe.send_bytes(json.dumps([name, values]).encode())

    def end(self) -> Any:
        """Return the result of the call that `begin` started.

        Raises:
            Internal: The process has failed.
        """
        try:
            return json.loads(self._pipe.recv_bytes())
        except EOFError as exc:
            raise Internal("a process of the benchmark failed; see its traceback above") from exc


@contextmanager
def process(role: Role, *values: Any, threads: int = 1) -> Iterator[Process]:
    """Run a role in a process with `threads` threads of torch, until the end of the block."""
    context = get_context("forkserver")
    context.set_forkserver_preload([role.__module__])  # its imports take seconds
    ours, theirs = context.Pipe()
    # A daemon, so that it ends if this process fails before the end of the block.
    started = context.Process(target=_play, args=(role, values, threads, theirs), daemon=True)
    started.start()
    # With the process's copy alone left open, its end closes the pipe.
    theirs.close()
    with ours:
        yield Process(ours)
    started.join()


def _play(
    role: Role, values: tuple[Any, ...], threads: int, pipe: "Connection[bytes, bytes]"
) -> None:
    quiet_libraries()
    torch.set_num_threads(threads)
    with role(*values) as answers:
        while True:
            try:
                name, arguments = json.loads(pipe.recv_bytes())
            except EOFError:  # the process that started this one has closed the pipe
                return
            pipe.send_bytes(json.dumps(answers[name](*arguments)).encode())


@contextmanager
def threads_of_torch(number: int) -> Iterator[None]:
    """Set the number of torch's threads in this process inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def command_server(*words: str, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """Run a server of the `fedsplit` command inside the block; yield the address that it prints.

    Raises:
        Internal: It did not start.
    """
    command = [sys.executable, "-u", "-m", "fedsplit", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout
            line = server.stdout.readline()
            if " at " not in line:
                raise Internal(f"fedsplit {words[0]} did not start: {line!r}")
            yield line.partition(" at ")[2].split(";")[0].split()[0]
        finally:
            server.terminate()
