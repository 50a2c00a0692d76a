"""Work that waits for somebody else, overlapped: while one piece waits, the next one is done.

Each worker is a thread, because a piece of work, such as the forward of a family's own class, is
one call that waits somewhere inside. But only one computes at a time, and whose turn it is depends
on nothing but the order of the work. So sums have one order, and the same bits every time.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


class Relay:
    """Workers that take turns, always in the same order.

    Args:
        num_workers: How many pieces of work are begun and not done at a time, at most.
    """

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._place = _Place()

    @property
    def has_me(self) -> bool:
        """Whether the calling thread is one of the workers."""
        return self._place.is_worker

    def run(self, works: Sequence[Callable[[], T]]) -> list[T]:
        """Do every piece of work; what each returned.

        Worker w does pieces w, w + `num_workers`, and so on. It has its turn until a piece is
        `away`, and has another, once that has come back, after all others had theirs.

        Raises:
            BaseException: The first failure; the other pieces end when it is their turn.
        """
        size = min(self._num_workers, len(works))
        turns = _Turns(size)
        done: dict[int, T] = {}

        def work(number: int) -> None:
            self._place.is_worker, self._place.turns, self._place.number = True, turns, number
            # A backward that waits must hold up its own thread only, not that of a device.
            with torch.autograd.set_multithreading_enabled(False), turns.all_of(number):
                for piece in range(number, len(works), size):
                    done[piece] = works[piece]()

        pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="fedsplit-relay")
        with pool, turns.ending_at_failure():
            wait([pool.submit(work, number) for number in range(size)])
        turns.raise_failure()
        return [done[piece] for piece in range(len(works))]

    @contextmanager
    def away(self) -> Iterator[None]:
        """A block in which others have their turns; at its end this worker waits for its own."""
        turns, number = self._place.turns, self._place.number
        turns.pass_on()
        try:
            yield
        finally:
            turns.take(number)


class _Over(Exception):
    """Another worker has failed; nobody has a turn any more."""


class _Turns:
    """Whose turn it is: workers in a ring, which get the turn one after another."""

    def __init__(self, num_workers: int) -> None:
        self._ring = deque(range(num_workers))
        self._failures: list[BaseException] = []
        self._changed = threading.Condition()

    @contextmanager
    def all_of(self, worker: int) -> Iterator[None]:
        """A worker's first turn to its last one."""
        with self.ending_at_failure():
            self.take(worker)
            yield
        with self._changed:
            self._ring.popleft()
            self._changed.notify_all()

    @contextmanager
    def ending_at_failure(self) -> Iterator[None]:
        """A block after whose failure nobody has a turn any more."""
        try:
            yield
        except BaseException as failure:
            with self._changed:
                self._failures.append(failure)
                self._changed.notify_all()
            raise

    def take(self, worker: int) -> None:
        """Wait for a worker's turn.

        It comes: whoever has the turn computes, or waits for a call with a budget of its own
        (`fedsplit.client.retry`), and then passes the turn on, is done, or fails.

        Raises:
            _Over: Another one has failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failures or self._ring[0] == worker)
            if self._failures:
                raise _Over

    def pass_on(self) -> None:
        """Let the next one have its turn."""
        with self._changed:
            self._ring.rotate(-1)
            self._changed.notify_all()

    def raise_failure(self) -> None:
        """Raise the first failure, if there is one, and keep none: it holds all that it met."""
        first, self._failures = self._failures[:1], []
        if first:
            raise first.pop()


class _Place(threading.local):
    """Which worker a thread is, if it is one."""

    is_worker = False
    turns: _Turns
    number: int
