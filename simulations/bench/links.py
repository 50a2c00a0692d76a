"""Links around a link: one that is slow on purpose, and one that takes notes."""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torch import Tensor

from fedsplit.link import Link, Stream
from fedsplit.transport.client import GrpcLink
from fedsplit.wire.messages import R, Request


class DelayedLink(Link):
    """Adds a latency to every exchange, there and back together.

    Args:
        link: What carries the requests.
        seconds: How much later each reply comes.
        sleep: What waits.
    """

    def __init__(
        self, link: Link, seconds: float, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._link = link
        self._seconds = seconds
        self._sleep = sleep

    def exchange(self, request: Request[R]) -> R:
        """Wait, then have the request carried."""
        self._sleep(self._seconds)
        return self._link.exchange(request)

    def stream(self) -> Stream:
        """One on which each reply is late, and others are on their way meanwhile."""
        return _DelayedStream(self._link.stream(), partial(self._sleep, self._seconds))

    def close(self) -> None:
        """Close the link inside."""
        self._link.close()


class _DelayedStream(Stream):
    def __init__(self, stream: Stream, wait: Callable[[], None]) -> None:
        self._stream = stream
        self._wait = wait

    def begin(self, request: Request[R]) -> Callable[[], R]:
        answer = self._stream.begin(request)

        def late() -> R:
            reply = answer()
            self._wait()
            return reply

        return late


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A request, and what it and its reply took: tensors, and bytes of all their frames."""

    request: Any
    num_tensors: int
    num_bytes: int


class WatchedLink(Link):
    """Notes every request that was answered in `seen`, until `forget`."""

    def __init__(self, link: GrpcLink) -> None:
        self.seen: list[Seen] = []
        self._link = link

    def exchange(self, request: Request[R]) -> R:
        """Have the request carried, and note it."""
        before = self._num_bytes
        reply = self._link.exchange(request)
        self.seen.append(
            Seen(
                request=request,
                num_tensors=_tensors_in(request) + _tensors_in(reply),
                num_bytes=self._num_bytes - before,
            )
        )
        return reply

    def close(self) -> None:
        """Close the link inside."""
        self._link.close()

    def forget(self) -> None:
        """Begin a new list."""
        self.seen = []

    def of(self, kind: type[Request[Any]]) -> list[Seen]:
        """What was seen of one kind."""
        return [seen for seen in self.seen if isinstance(seen.request, kind)]

    @property
    def _num_bytes(self) -> int:
        return self._link.bytes_up + self._link.bytes_down


def _tensors_in(message: Any) -> int:
    return sum(isinstance(getattr(message, field.name), Tensor) for field in fields(message))
