"""Threads of which one runs at a time, so that calls that wait for one another have one order.

A call of the service blocks while its client waits at a barrier. In a schedule, nothing may depend
on how a machine schedules threads. So the caller runs until the call returns or parks, and resumes
parked calls in an order of its own.
"""

import threading
from collections.abc import Callable
from typing import Any


class Task:
    """A call that was begun; it ends with an `error`, or without one."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work
        self.is_done = False
        self.error: BaseException | None = None


class Turns:
    """Begins and resumes calls; its threads serve one call after the other."""

    def __init__(self) -> None:
        self._idle: list[_Worker] = []
        self._running: dict[Task, _Worker] = {}
        self._current: _Worker | None = None

    def begin(self, work: Callable[[], Any]) -> Task:
        """Run a call until it returns or parks."""
        task = Task(work)
        worker = self._idle.pop() if self._idle else _Worker()
        worker.task = task
        self._running[task] = worker
        self.resume(task)
        return task

    def resume(self, task: Task) -> None:
        """Continue a parked call until it returns or parks again."""
        worker, before = self._running[task], self._current
        self._current = worker
        worker.go.release()
        worker.back.acquire()
        self._current = before
        if task.is_done:
            del self._running[task]
            self._idle.append(worker)
            if task.error:
                raise task.error

    def park(self) -> None:
        """Return from `begin` or `resume` of the present call, and wait until it is resumed."""
        worker = self._current
        assert worker is not None, "only a call that was begun can park"
        worker.back.release()
        worker.go.acquire()

    def close(self) -> None:
        """End the idle threads."""
        for worker in self._idle:
            worker.task = None
            worker.go.release()
            worker.thread.join()
        self._idle.clear()


class _Worker:
    def __init__(self) -> None:
        self.go, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.task: Task | None = None
        self.thread = threading.Thread(target=self._serve, name="schedule-turn", daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            self.go.acquire()
            task = self.task
            if task is None:
                return
            try:
                task.work()
            # It is raised again by the thread that began the call.
            except BaseException as error:
                task.error = error
            task.is_done = True
            self.back.release()
