"""Programs in processes that are forked from one that has imported the libraries.

The imports take seconds, and every process that is not forked repeats them.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
import threading
from multiprocessing.connection import Connection
from pathlib import Path

from tests.house.source import ROOT

_LIBRARIES = [
    "fedsplit.cli.serve",
    "fedsplit.flower.client_app",
    "fedsplit.flower.server_app",
    "fedsplit.serve",
    "simulations.sweep",
    "strategies",
    "tests.core.generating",
    "tests.edge.resuming",
]


class Program:
    """`python -m MODULE ARGUMENT...` in a forked process, which inherits the environment.

    Used as a context, it is killed at the end of the block.

    Args:
        module: The module that runs as `__main__`.
        arguments: The words of its command line.
        folder: Its working directory.
        output: The descriptor it writes its output to; by default a pipe that `stdout` reads.
    """

    def __init__(
        self, module: str, *arguments: object, folder: Path = ROOT, output: int | None = None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_LIBRARIES)
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        reader, writer = os.pipe()
        self.stdout = os.fdopen(reader, encoding="utf-8")
        if output is not None:
            os.dup2(output, writer)
        outputs = (writer, os.dup(self._errors.fileno()))
        # A descriptor travels to another process inside a connection.
        sent = [Connection(descriptor, readable=False) for descriptor in outputs]
        words = [module, *map(str, arguments)]
        self._process = context.Process(target=_run, args=(words, folder, dict(os.environ), *sent))
        self._process.start()
        for connection in sent:
            connection.close()

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._process.join()
        self.stdout.close()
        self._errors.close()

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def send_signal(self, number: int) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, if it has not ended."""
        self._process.kill()

    def end(self, timeout_s: float = 120.0) -> tuple[int, str, str]:
        """Wait for the end, and kill the process if it takes longer than `timeout_s` seconds.

        Returns:
            The exit code (a negative one is a signal's), the rest of the output, and all errors.
        """
        timer = threading.Timer(timeout_s, self.kill)
        timer.start()
        try:
            with self:
                output = "" if self.stdout.closed else self.stdout.read()
                self._process.join()
                self._errors.seek(0)
                return self._process.exitcode, output, self._errors.read()
        finally:
            timer.cancel()


def _run(
    words: list[str],
    folder: Path,
    environment: dict[str, str],
    stdout: Connection,
    stderr: Connection,
) -> None:
    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    stdout.close()
    stderr.close()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
