"""The micro-batches of a step as a pipeline: one computes while the trunk works on the others.

Each worker is a thread, because the forward of a family's own class is one call that blocks on the
trunk's reply. Only one worker computes at a time, in a fixed order, and a worker sends its request
before it passes its turn on. So every sum, at client and trunk, has one order, and results are the
same bit by bit. A lost request is sent again at its worker's next turn, while the others wait.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from typing import TypeVar

import torch

from fedsplit.errors import FedsplitError
from fedsplit.link import Link, Stream
from fedsplit.wire.messages import R, Request

T = TypeVar("T")


class MicroBatchPipeline:
    """Runs micro-batches in worker threads that take turns in a fixed order.

    Args:
        link: The link to the trunk.
        num_workers: The most micro-batches of a step that are in progress at a time.
    """

    _stream: Stream  # of the current step

    def __init__(self, link: Link, num_workers: int) -> None:
        self._link = link
        self._num_workers = num_workers
        self._thread = _ThreadState()

    def run(self, pieces: Sequence[Callable[[], T]]) -> list[T]:
        """Run all pieces; return their results in order.

        Worker w runs pieces w, w + `num_workers`, and so on. It keeps its turn until it waits for
        a reply. Its next turn comes after all other workers had theirs.

        Raises:
            BaseException: The first failure; the other workers end at their next turn.
        """
        self._stream = self._link.stream()
        size = min(self._num_workers, len(pieces))
        turns = _Turns(size)
        results: dict[int, T] = {}

        def work(worker: int) -> None:
            self._thread.turns, self._thread.worker = turns, worker
            # Autograd has one thread per GPU; a backward that waits there would block all others.
            with torch.autograd.set_multithreading_enabled(False), turns.all_of(worker):
                for piece in range(worker, len(pieces), size):
                    results[piece] = pieces[piece]()

        pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="fedsplit-micro-batch")
        with pool, turns.ending_at_failure():
            # Each in a context of its own, a copy of that of the step.
            wait([pool.submit(copy_context().run, work, worker) for worker in range(size)])
        turns.raise_failure()
        return [results[piece] for piece in range(len(pieces))]

    @property
    def is_worker(self) -> bool:
        """Whether the calling thread is a worker."""
        return self._thread.turns is not None

    def begin(self, request: Request[R]) -> Callable[[], R]:
        """Send the request of a piece; the other workers run until its reply is there.

        Returns:
            A function that returns the reply or raises the failure.
        """
        turns, worker = self._thread.turns, self._thread.worker
        assert turns is not None, "only a worker has a turn to pass on"
        outcome: Future[R] = Future()
        # Sent before the turn is passed on, so that the trunk gets requests in the fixed order.
        answer = self._stream.begin(request)
        turns.pass_on()
        try:
            outcome.set_result(answer())
        except FedsplitError as failure:
            outcome.set_exception(failure)
        finally:
            turns.take(worker)
        return outcome.result


class _ThreadState(threading.local):
    """The worker that a thread runs, if it runs one."""

    turns: "_Turns | None" = None
    worker = 0


class _Aborted(Exception):
    """Another worker has failed, so no worker gets a turn any more."""


class _Turns:
    """The order of workers: a ring in which the first one has the turn."""

    def __init__(self, num_workers: int) -> None:
        self._ring = deque(range(num_workers))
        self._failures: list[BaseException] = []
        self._changed = threading.Condition()

    @contextmanager
    def all_of(self, worker: int) -> Iterator[None]:
        """A context from a worker's first turn to its last one."""
        with self.ending_at_failure():
            self.take(worker)
            yield
        with self._changed:
            self._ring.popleft()
            self._changed.notify_all()

    @contextmanager
    def ending_at_failure(self) -> Iterator[None]:
        """A context; if its block fails, no worker gets a turn any more."""
        try:
            yield
        except BaseException as failure:
            with self._changed:
                self._failures.append(failure)
                self._changed.notify_all()
            raise

    def take(self, worker: int) -> None:
        """Wait for a worker's turn.

        The wait is bounded: the worker that has the turn computes, or waits for a call with a time
        budget (`fedsplit.client.rpc`); then it passes the turn on, ends, or fails.

        Raises:
            _Aborted: Another worker has failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failures or self._ring[0] == worker)
            if self._failures:
                raise _Aborted

    def pass_on(self) -> None:
        """Pass the turn on to the next worker."""
        with self._changed:
            self._ring.rotate(-1)
            self._changed.notify_all()

    def raise_failure(self) -> None:
        """Raise the first failure, if there is one."""
        # A kept failure would keep alive every tensor in the frames of its traceback.
        first, self._failures = self._failures[:1], []
        if first:
            raise first.pop()
