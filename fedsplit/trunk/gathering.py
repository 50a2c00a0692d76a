"""Calls of several clients that are worked on together: those of a kind wait for one another."""

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

C = TypeVar("C")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Waiting(Generic[C, R]):
    """A call of a session; those that are worked on together are so in the order of `place`."""

    call: C
    session: str
    place: Any
    future: "Future[R]"


@dataclass(slots=True, kw_only=True, eq=False)
class _Group(Generic[C, R]):
    due: float
    calls: list[Waiting[C, R]] = field(default_factory=list)


class Gathering(Generic[C, R]):
    """Calls by their kind, each kind until there are enough of it or one has waited for long.

    Args:
        work: Sees to calls of one kind, in their order.
        wait_s: How long a call waits for others, in seconds.
        clock: Seconds that do not run backwards.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Waiting[C, R]]], None],
        wait_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._work = work
        self._wait_s = wait_s
        self._clock = clock
        self._groups: dict[Hashable, _Group[C, R]] = {}

    def put(self, kind: Hashable, call: Waiting[C, R], enough: int) -> None:
        """Leave a call; works at once if there are `enough` of its kind now."""
        group = self._groups.setdefault(kind, _Group(due=self._clock() + self._wait_s))
        group.calls.append(call)
        if len(group.calls) >= enough:
            self._run(kind)

    def due_in(self) -> float:
        """Seconds until a kind has waited for long enough."""
        first = min((group.due for group in self._groups.values()), default=float("inf"))
        return max(0.0, first - self._clock())

    def run_due(self) -> None:
        """Work on what has waited for long enough."""
        now = self._clock()
        for kind in [kind for kind, group in self._groups.items() if group.due <= now]:
            self._run(kind)

    def withdraw(self, session: str) -> list[Waiting[C, R]]:
        """Take back the calls of a session."""
        gone = [call for call in self._waiting() if call.session == session]
        for group in self._groups.values():
            group.calls = [call for call in group.calls if call.session != session]
        self._groups = {kind: group for kind, group in self._groups.items() if group.calls}
        return gone

    def futures(self) -> "list[Future[Any]]":
        """Of all calls that wait."""
        return [call.future for call in self._waiting()]

    def _waiting(self) -> list[Waiting[C, R]]:
        return [call for group in self._groups.values() for call in group.calls]

    def _run(self, kind: Hashable) -> None:
        self._work(sorted(self._groups.pop(kind).calls, key=lambda call: call.place))
