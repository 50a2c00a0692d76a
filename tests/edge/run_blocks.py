"""Run commands and Python of pages in this process: python -m tests.edge.run_blocks JSON.

The JSON is a list of pages. A page is a list of tasks, each a kind and its words: "serve" with the
words of `fedsplit serve`, which serves until the end of its page; "fedsplit" with the words of
another command; "python" with a text; "sh" with a text; or a module with its arguments.
"""

import gc
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Without collections of garbage the libraries are imported in less time.
gc.disable()
import fedsplit.flower.server_app  # noqa: E402, F401
from fedsplit.cli import main  # noqa: E402

gc.freeze()
gc.enable()


class Server:
    """`fedsplit serve` in a process of its own, which exists from the beginning.

    Args:
        number: Names the file of its output.
        words: Its arguments.
    """

    def __init__(self, number: int, words: list[str]) -> None:
        self._output = Path(f"serve-{number}.log")
        reader, self._start = os.pipe()
        # A fork is safe before this process has threads.
        self._process = os.fork()
        if self._process == 0:
            os.read(reader, 1)
            with self._output.open("w") as output:
                os.dup2(output.fileno(), 1)
            os._exit(main(["serve", *words]))

    def start(self) -> None:
        """Let it serve, and return when it does."""
        os.write(self._start, b"!")
        while not (self._output.exists() and "serving " in self._output.read_text()):
            ended, status = os.waitpid(self._process, os.WNOHANG)
            assert not ended, f"it ended with {status}"
            time.sleep(0.05)

    def stop(self) -> None:
        """End it."""
        os.kill(self._process, signal.SIGTERM)
        _, status = os.waitpid(self._process, 0)
        self._process = 0
        assert status == 0, status

    def kill(self) -> None:
        """End it at once, whether it serves or not."""
        if self._process:
            os.kill(self._process, signal.SIGKILL)


@contextmanager
def as_a_new_process() -> Iterator[None]:
    """Undo what a program sets for its process: the environment, and where the log goes."""
    environment, tree = dict(os.environ), logging.getLogger("fedsplit")
    level, handlers = tree.level, list(tree.handlers)
    yield
    os.environ.clear()
    os.environ.update(environment)
    tree.setLevel(level)
    tree.handlers = handlers


@contextmanager
def errors_in(words: list[str]) -> Iterator[list[str]]:
    """Do what `2> FILE` at the end of a command's words says; gives the words before it."""
    if words[-2:-1] != ["2>"]:
        yield words
        return
    before = os.dup(2)
    with Path(words[-1]).open("w") as errors:
        os.dup2(errors.fileno(), 2)
    yield words[:-2]
    os.dup2(before, 2)


def run(kind: str, words: list[str], names: dict[str, Any]) -> None:
    """Run a task; `names` are those of the page's Python so far.

    Raises:
        SystemExit: It failed.
        Exception: Python that failed.
    """
    print("---", kind, *words, flush=True)
    if kind == "python":
        exec(compile(words[0], "a page", "exec"), names)
    elif kind == "sh":
        subprocess.run(["bash", "-euo", "pipefail", "-c", words[0]], check=True)
    elif kind == "fedsplit":
        if status := main(words):
            sys.exit(status)
    else:
        with errors_in(words) as arguments:
            sys.argv = [kind, *arguments]
            try:
                runpy.run_module(kind, run_name="__main__")
            except SystemExit as end:
                if end.code:
                    raise


def run_page(page: list[list[str]], servers: Iterator[Server]) -> None:
    """Run the tasks of a page, whose servers end with it."""
    serving: list[Server] = []
    names: dict[str, Any] = {}
    for kind, *words in page:
        if kind == "serve":
            serving.append(next(servers))
            serving[-1].start()
        else:
            with as_a_new_process():
                run(kind, words, names)
    for server in serving:
        server.stop()


if __name__ == "__main__":
    pages: list[list[list[str]]] = json.loads(sys.argv[1])
    tasks = [task for page in pages for task in page]
    all_servers = [Server(n, words) for n, (kind, *words) in enumerate(tasks) if kind == "serve"]
    servers = iter(all_servers)
    try:
        for page in pages:
            run_page(page, servers)
    finally:
        # A server that is left would hold the output open, for which the test waits.
        for each in all_servers:
            each.kill()
