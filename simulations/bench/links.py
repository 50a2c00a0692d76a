"""Links that wrap a link: one adds latency, the other records requests."""

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
        link: The wrapped link.
        seconds: The latency of each exchange.
        sleep: Waits for a number of seconds.
    """

    def __init__(
        self, link: Link, seconds: float, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._link = link
        self._seconds = seconds
        self._sleep = sleep

    def exchange(self, request: Request[R]) -> R:
        """Wait, then exchange the request over the wrapped link."""
        self._sleep(self._seconds)
        return self._link.exchange(request)

    def stream(self) -> Stream:
        """Return a stream that delays each reply, while other requests are under way."""
        return _DelayedStream(self._link.stream(), partial(self._sleep, self._seconds))

    def close(self) -> None:
        """Close the wrapped link."""
        self._link.close()


class _DelayedStream(Stream):
    def __init__(self, stream: Stream, wait: Callable[[], None]) -> None:
        self._stream = stream
        self._wait = wait

    def begin(self, request: Request[R]) -> Callable[[], R]:
        receive = self._stream.begin(request)

        def receive_late() -> R:
            reply = receive()
            # After the reply and not before the request, so that requests overlap.
            self._wait()
            return reply

        return receive_late


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A request, with the number of tensors in it and its reply, and the bytes of their frames."""

    request: Any
    num_tensors: int
    num_bytes: int


class WatchedLink(Link):
    """Records every request that was answered in `seen`, until `forget`."""

    def __init__(self, link: GrpcLink) -> None:
        self.seen: list[Seen] = []
        self._link = link

    def exchange(self, request: Request[R]) -> R:
        """Exchange the request over the wrapped link, and record it."""
        # The link's counters are those of all requests; here one is under way at a time.
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
        """Close the wrapped link."""
        self._link.close()

    def forget(self) -> None:
        """Clear the records."""
        self.seen = []

    def of(self, kind: type[Request[Any]]) -> list[Seen]:
        """Return the records of requests of one class."""
        return [seen for seen in self.seen if isinstance(seen.request, kind)]

    @property
    def _num_bytes(self) -> int:
        return self._link.bytes_up + self._link.bytes_down


def _tensors_in(message: Any) -> int:
    return sum(isinstance(getattr(message, field.name), Tensor) for field in fields(message))
