"""Processes of a bench: each answers questions of the one that started it, as JSON.

What a process is, a context manager says that runs in it and yields its answers by name.
"""

import json
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
    """A process of a bench, as seen from the one that started it."""

    def __init__(self, pipe: "Connection[bytes, bytes]") -> None:
        self._pipe = pipe

    def ask(self, name: str, *values: Any) -> Any:
        """The answer of this name, called with plain values.

        Raises:
            Internal: The process has failed.
        """
        self.begin(name, *values)
        return self.end()

    def begin(self, name: str, *values: Any) -> None:
        """Ask without waiting; `end` has the answer."""
        self._pipe.send_bytes(json.dumps([name, values]).encode())

    def end(self) -> Any:
        """The answer to what was begun."""
        try:
            return json.loads(self._pipe.recv_bytes())
        except EOFError as exc:
            raise Internal("a process of the bench failed; it says above why") from exc


@contextmanager
def process(role: Role, *values: Any, threads: int = 1) -> Iterator[Process]:
    """A process of a role, which computes with so many threads; gone at the end of the block."""
    context = get_context("forkserver")
    context.set_forkserver_preload([role.__module__])  # what it imports takes seconds
    ours, theirs = context.Pipe()
    started = context.Process(target=_play, args=(role, values, threads, theirs), daemon=True)
    started.start()
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
                name, given = json.loads(pipe.recv_bytes())
            except EOFError:  # nobody is left to ask
                return
            pipe.send_bytes(json.dumps(answers[name](*given)).encode())


@contextmanager
def threads_of_torch(number: int) -> Iterator[None]:
    """A block in which this process computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
