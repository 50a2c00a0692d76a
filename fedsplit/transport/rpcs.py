"""The calls of a server: each reads its peer's frames, answers them, and may be ended meanwhile.

gRPC starts a call as soon as its metadata has arrived. So a call is in a slot before its body is
read, and the slot's owner decides how long to wait for the body.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2

from fedsplit.errors import FedsplitError, ProtocolError
from fedsplit.spec import LimitsSpec
from fedsplit.transport.slots import Slot, Slots
from fedsplit.transport.status import set_status

Send = Callable[[bytes | None], None]


class _AtOnce(ThreadPoolExecutor):
    """Runs work in the thread that submits it."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


class Refusal:
    """A call that is refused by its metadata; it takes no slot, no thread, and reads nothing."""

    experimental_non_blocking = True
    experimental_thread_pool = _AtOnce()

    def __init__(self, error: FedsplitError) -> None:
        self._error = error

    def __call__(self, frames: Iterator[bytes], context: grpc.ServicerContext, send: Send) -> None:
        """End the call with its error."""
        set_status(context, self._error)
        send(None)


class Rpc(ABC):
    """One call, in a slot from its metadata to its end.

    Args:
        slots: The slots of its kind.
        limits: The time for a body, and for silence.
        client: The caller's name, or empty.

    Raises:
        Overloaded: There is no slot for it.
    """

    # gRPC passes `send` then, with which another thread can end the call.
    experimental_non_blocking = True

    def __init__(self, slots: Slots, limits: LimitsSpec, client: str) -> None:
        self._slots = slots
        self._limits = limits
        self._client = client
        self._slot = Slot(client=client, end=self._finish)
        self._is_sending = False
        self._is_finished = False
        self._received = self._sent = 0
        self._lock = threading.Lock()  # guards `_is_finished`
        slots.enter(self._slot)

    def __call__(self, frames: Iterator[bytes], context: grpc.ServicerContext, send: Send) -> None:
        """Serve the call, in a thread of the server's pool."""
        self._context, self._send = context, send
        failure: FedsplitError | None = None
        try:
            self.serve(frames, context)
        except FedsplitError as error:
            failure = error
        finally:
            self._slots.leave(self._slot)
        self._finish(failure)

    @abstractmethod
    def serve(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> None:
        """Read and answer the frames of the peer.

        Raises:
            FedsplitError: The call ends with it.
        """

    def receive(self, frames: Iterator[bytes], *, idle: bool = False) -> bytes | None:
        """The next frame; None after the last one. With `idle`, no message has begun.

        Raises:
            FedsplitError: Another thread has ended the call.
        """
        seconds = self._limits.idle_s if idle else self._limits.body_s
        setting = "limits.idle_s" if idle else "limits.body_s"
        self._slots.await_peer(self._slot, seconds, setting)
        frame = next(frames, None)
        self._slots.work(self._slot)
        self._received += len(frame or b"")
        return frame

    def send(self, frame: bytes) -> None:
        """Send a frame, and wait until the peer takes it.

        Raises:
            FedsplitError: Another thread has ended the call.
        """
        # A client may compute for long before it takes a reply.
        self._slots.await_peer(self._slot, self._limits.idle_s, "limits.idle_s")
        self._is_sending = True
        self._send(frame)
        self._is_sending = False
        self._sent += len(frame)
        self._slots.work(self._slot)

    def take_counts(self) -> tuple[int, int]:
        """Return the bytes of frames that were received and sent since the last call."""
        counts, self._received, self._sent = (self._received, self._sent), 0, 0
        return counts

    def settle(self) -> None:
        """Note that a request was answered, and others may follow."""
        self._slot.settled = True

    def _finish(self, error: FedsplitError | None) -> None:
        """End the call once, from whichever thread comes first."""
        with self._lock:
            if self._is_finished:
                return
            self._is_finished = True
        if error:
            set_status(self._context, error)
        self._send(None)
        if self._is_sending:  # the status would wait behind the frame that the peer does not take
            self._context.cancel()  # type: ignore[no-untyped-call]  # in the stubs


class HealthCheck(Rpc):
    """A Check of the standard health service.

    Args:
        servicer: The status of each service.
        slots: See `Rpc`.
        limits: See `Rpc`.
    """

    def __init__(self, servicer: health.HealthServicer, slots: Slots, limits: LimitsSpec) -> None:
        self._servicer = servicer
        super().__init__(slots, limits, client="")

    def serve(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> None:
        """See `Rpc`."""
        try:
            request = health_pb2.HealthCheckRequest.FromString(self.receive(frames) or b"")
        except DecodeError as exc:
            raise ProtocolError("the message is no HealthCheckRequest") from exc
        self.send(self._servicer.Check(request, context).SerializeToString())
