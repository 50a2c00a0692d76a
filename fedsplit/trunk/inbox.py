"""Work on its way to the engine's thread: what is taken first, and that none is ever forgotten."""

import itertools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

from fedsplit.errors import FedsplitError


class Task(NamedTuple):
    """Something to run, by priority and then in order; `future` is what its sender waits for."""

    priority: int
    order: int
    future: "Future[Any]"
    run: Callable[[], None]


class Inbox:
    """Filled by any thread, emptied by one; once closed, every sender is told why."""

    def __init__(self) -> None:
        self.closed: FedsplitError | None = None
        self._door = threading.Lock()
        self._order = itertools.count()
        self._tasks: queue.PriorityQueue[Task] = queue.PriorityQueue()

    def put(self, priority: int, future: "Future[Any]", run: Callable[[], None]) -> None:
        """Leave a task; the lowest priority is taken first.

        Raises:
            FedsplitError: What the inbox was closed with.
        """
        with self._door:
            if self.closed:
                raise self.closed
            self._tasks.put(Task(priority, next(self._order), future, run))

    def take(self, patience_s: float) -> Task | None:
        """The next task; nothing if none comes in time."""
        try:
            return self._tasks.get(timeout=patience_s)
        except queue.Empty:
            return None

    def has(self, priority: int) -> bool:
        """Whether a task waits that is at least as urgent."""
        with self._tasks.mutex:
            return bool(self._tasks.queue) and self._tasks.queue[0].priority <= priority

    def close(self, why: FedsplitError) -> None:
        """Refuse what is in here and all that comes; a second call does nothing."""
        with self._door:
            self.closed = self.closed or why
        while not self._tasks.empty():
            self._tasks.get().future.set_exception(self.closed)
