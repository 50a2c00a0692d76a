"""The micro-batches of a step as a pipeline: one computes while the trunk works for the others.

Each worker is a thread, because the forward of a family's own class is one call that waits
somewhere inside. Only one worker computes at a time, in a fixed order, and it sends its request
before it hands its turn on. So every sum, here and at the trunk, has one order, and the bits are
the same every time. A lost request is sent again at its worker's next turn, while the others wait.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

from fedsplit.errors import FedsplitError
from fedsplit.link import Link, Stream
from fedsplit.wire.messages import R, Request

T = TypeVar("T")


class MicroBatchPipeline:
    """Workers that take turns, always in the same order.

    Args:
        link: Leads to the trunk.
        num_workers: How many pieces of a step are begun and not done at a time, at most.
    """

    _stream: Stream  # of the step that is under way

    def __init__(self, link: Link, num_workers: int) -> None:
        self._link = link
        self._num_workers = num_workers
        self._place = _Place()

    def run(self, pieces: Sequence[Callable[[], T]]) -> list[T]:
        """Run all pieces; what each returned.

        Worker w runs pieces w, w + `num_workers`, and so on. It keeps its turn until it waits for
        a reply, and has another once the reply is there and all others had theirs.

        Raises:
            BaseException: The first failure; the other pieces end when it is their turn.
        """
        self._stream = self._link.stream()
        size = min(self._num_workers, len(pieces))
        turns = _Turns(size)
        results: dict[int, T] = {}

        def work(worker: int) -> None:
            self._place.turns, self._place.worker = turns, worker
            # A backward that waits must hold up its own thread only, not that of a device.
            with torch.autograd.set_multithreading_enabled(False), turns.all_of(worker):
                for piece in range(worker, len(pieces), size):
                    results[piece] = pieces[piece]()

        pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="fedsplit-micro-batch")
        with pool, turns.ending_at_failure():
            wait([pool.submit(work, worker) for worker in range(size)])
        turns.raise_failure()
        return [results[piece] for piece in range(len(pieces))]

    @property
    def is_worker(self) -> bool:
        """Whether the calling thread runs a piece."""
        return self._place.turns is not None

    def begin(self, request: Request[R]) -> Callable[[], R]:
        """Send the request of a piece and let the others have their turns until its reply is here.

        Returns:
            A function that returns the reply, or raises why there is none.
        """
        turns, worker = self._place.turns, self._place.worker
        assert turns is not None, "only a worker has a turn to hand on"
        outcome: Future[R] = Future()
        answer = self._stream.begin(request)
        turns.pass_on()
        try:
            outcome.set_result(answer())
        except FedsplitError as failure:
            outcome.set_exception(failure)
        finally:
            turns.take(worker)
        return outcome.result


class _Place(threading.local):
    """Which worker a thread is, if it is one."""

    turns: "_Turns | None" = None
    worker = 0


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

        It comes: the worker that has the turn computes, or waits for a call with a budget of its
        own (`fedsplit.client.rpc`), and then passes the turn on, is done, or fails.

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
