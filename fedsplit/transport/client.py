"""The client of the transport: a link to one trunk over gRPC.

Tensors go over one Exchange stream, all else over unary calls. The link makes one attempt per
request; retries are up to the caller. After a broken stream, the next request opens a new one.
"""

import itertools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, cast

import grpc
from torch import Tensor

from fedsplit.errors import FedsplitError, ProtocolError, TrunkGone
from fedsplit.link import Link, Stream
from fedsplit.spec import WireSpec
from fedsplit.telemetry.spans import sent_ids
from fedsplit.transport.address import check_port
from fedsplit.transport.frames import (
    ALIGNMENT,
    CALLS,
    FRAME_BYTES,
    HEADER_BYTES,
    SERVICE,
    Body,
    Reader,
    to_frame,
    to_frames,
)
from fedsplit.transport.status import (
    MAX_METADATA_BYTES,
    TOKEN_KEY,
    from_rpc_error,
    from_status,
    is_refused,
)
from fedsplit.transport.tls import channel_credentials
from fedsplit.wire.codec import traveling
from fedsplit.wire.messages import GradientsRequest, R, Request
from fedsplit.wire.replies import check_reply
from fedsplit.wire.server_messages import ParametersRequest

LONG_REPLY_BYTES = 4 << 30
"""The longest payload of gradients, or of keys and values, that a client accepts."""

_PARAMETERS_BYTES = 1 << 40
"""The longest payload of parameters that a follower accepts from its leader, which it trusts."""

_NAMED = (GradientsRequest, ParametersRequest)
"""The requests whose replies have names of tensors in their header."""

# With the keepalive timeout alone, gRPC detects a frozen peer after more than a minute; with the
# ping timeout as well, it does after keepalive time plus ping timeout.
OPTIONS = (
    ("grpc.keepalive_time_ms", 10000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.ping_timeout_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.max_receive_message_length", FRAME_BYTES),
    # A message that gRPC decompresses may have a thousand times the bytes that were received.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # Links to the same address would share one connection otherwise.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)


class GrpcLink(Link):
    """A link to the trunk at `address` (host:port, or unix:path).

    Several threads may use it; their requests go over the stream one after another, and the
    replies come in the same order. The first request makes the connection. `bytes_up` and
    `bytes_down` count the bytes of all frames.

    Args:
        address: The address of the trunk server.
        token: The token that is sent with every call.
        wire: The deadline and TLS settings.
        ca: The PEM certificate of the authority to trust, in place of `wire.tls_ca`.
        patience_s: Seconds for which no process may listen at the address. After them a request
            fails with `TrunkGone`, which is final.

    Raises:
        ConfigError: `wire.tls_ca` cannot be read, or the port of the address does not exist.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str = "",
        wire: WireSpec,
        ca: bytes = b"",
        patience_s: float = math.inf,
    ) -> None:
        check_port("the trunk's address ", address)
        self._patience_s = patience_s
        self._refused_at: float | None = None  # the first refusal since the last reply
        self.bytes_up = 0
        self.bytes_down = 0
        self._address = address
        self.deadline_s = wire.call_deadline_s
        self._metadata = ((TOKEN_KEY, token),)
        self._process = os.getpid()
        self._stream_lock = threading.Lock()
        self._count_lock = threading.Lock()
        self._closed = False
        self._streams: list[_ExchangeStream] = []  # the one in use, if there is one
        if ca or wire.tls_ca or wire.tls_cert:
            self._channel = grpc.secure_channel(address, channel_credentials(wire, ca), OPTIONS)
        else:
            self._channel = grpc.insecure_channel(address, OPTIONS)

    def exchange(self, request: Request[R]) -> R:
        """Send a request and wait for its reply, at most `wire.call_deadline_s`.

        Raises:
            FedsplitError: The trunk's error, or the failure of the connection.
        """
        call = CALLS[type(request)]
        if not call.streams:
            self._check_open()
            return self.checked(request, self._unary(call.method, request))
        return self.stream().begin(request)()

    def stream(self) -> "_ExchangeStream":
        """The open stream; a new one if it is broken or there is none."""
        with self._stream_lock:
            self._check_open()
            if self._streams and self._streams[0].broken:
                self._streams.pop().end()
            if not self._streams:
                self._streams.append(_ExchangeStream(self, self._channel, self._metadata))
            return self._streams[0]

    def close(self) -> None:
        """Close the connection; calls in progress end with `ConnectionLost`."""
        # After a fork, the channel belongs to the parent process.
        if self._closed or os.getpid() != self._process:
            return
        self._closed = True
        self._channel.close()
        with self._stream_lock:
            for stream in self._streams:
                stream.end()
            self._streams.clear()

    def _check_open(self) -> None:
        # Not `ConnectionLost`, because a retry could not succeed.
        if os.getpid() != self._process:
            raise ProtocolError(
                f"the link to {self._address} was made before a fork; make a new one after it"
            )
        if self._closed:
            raise ProtocolError(f"the link to {self._address} is closed; make a new one")

    def _unary(self, method: str, request: Request[Any]) -> Body:
        send = self._channel.unary_unary(f"/{SERVICE}/{method}", bytes, bytes)
        frame = to_frame(request, sent_ids())
        try:
            answer = send(frame, timeout=self.deadline_s, metadata=self._metadata)
        except grpc.RpcError as exc:
            raise self.error_of(exc, expired=False) from exc
        self.count(len(frame), len(answer))
        return Reader(FRAME_BYTES).only(answer)

    def checked(self, request: Request[R], body: Body) -> R:
        """The body as the reply to this request.

        Raises:
            FedsplitError: The body is an error, or no legal reply.
        """
        self._refused_at = None
        if isinstance(body, FedsplitError):
            raise body
        reply = CALLS[type(request)].reply
        if not isinstance(body, reply):
            raise ProtocolError(
                f"the trunk at {self._address} answered a {type(request).__name__} with a "
                f"{type(body).__name__}"
            )
        check_reply(request, body)
        return cast(R, body)

    def error_of(self, exc: grpc.RpcError, *, expired: bool) -> FedsplitError:
        """Our error for one of gRPC; `expired` if the deadline ended the call."""
        # The watch cancels a late call, so gRPC itself reports CANCELLED.
        if expired:
            return self.error("DEADLINE_EXCEEDED")
        if is_refused(exc):
            now = time.monotonic()
            self._refused_at = self._refused_at or now
            if now - self._refused_at > self._patience_s:
                return TrunkGone(
                    f"no process has listened at {self._address} for {self._patience_s:g} s, so "
                    "the run of this trunk has ended"
                )
        return from_rpc_error(exc, self._address, self.deadline_s)

    def error(self, status: str, details: str = "") -> FedsplitError:
        """Our error for a status of gRPC."""
        return from_status(status, details, self._address, self.deadline_s)

    def count(self, up: int, down: int) -> None:
        """Add to the counts of bytes of frames."""
        with self._count_lock:
            self.bytes_up += up
            self.bytes_down += down


def _max_reply_bytes(request: Request[Any]) -> int:
    """The most bytes of payload in its reply: a reply is about as large as its request."""
    if isinstance(request, ParametersRequest):
        return _PARAMETERS_BYTES
    if isinstance(request, GradientsRequest) or getattr(request, "stateless", False):
        return LONG_REPLY_BYTES
    values = (getattr(request, field.name) for field in traveling(request))
    return sum(value.nbytes + ALIGNMENT for value in values if isinstance(value, Tensor))


class _ExchangeStream(Stream):
    """One Exchange call: frames out, frames in, and a thread that cancels it at the deadline.

    Several requests may be in progress; each has a lock that is released when its reply is the next
    one. The deadline of a request counts from then on. The stream is `broken` once no more replies
    can be read from it.
    """

    def __init__(
        self, link: GrpcLink, channel: grpc.Channel, metadata: tuple[tuple[str, str], ...]
    ) -> None:
        self._broken = False
        self._link = link
        self._expired = False
        self._outbox: SimpleQueue[Iterator[bytes] | None] = SimpleQueue()
        open_stream = channel.stream_stream(f"/{SERVICE}/Exchange", bytes, bytes)
        frames = itertools.chain.from_iterable(iter(self._outbox.get, None))
        self._frames: Any = open_stream(frames, metadata=metadata)
        self._due = math.inf
        self._unanswered: deque[threading.Lock] = deque()
        self._lock = threading.Lock()  # guards `_due` and `_unanswered`
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._end_if_late, name="fedsplit-watch", daemon=True)
        self._watch.start()

    def begin(self, request: Request[R]) -> Callable[[], R]:
        """Send a request; return a function that waits for its reply.

        Frames are made one by one as gRPC sends them, so they are never in memory together. The
        first one is made here, so that errors of encoding are raised here.
        """
        frames, is_next = to_frames(request, trace=sent_ids()), threading.Lock()
        is_next.acquire()
        first = next(frames)
        # Before the request is sent: the thread that sends it would wait for this one's work.
        most_header = FRAME_BYTES if isinstance(request, _NAMED) else HEADER_BYTES
        reader = Reader(_max_reply_bytes(request), most_header)
        # One lock for both queues: replies are read in the order in which requests are sent.
        with self._lock:
            self._unanswered.append(is_next)
            self._outbox.put(self._counted(itertools.chain((first,), frames)))
            if len(self._unanswered) == 1:
                self._await_next()
        return lambda: self._link.checked(request, self._answer(is_next, reader))

    @property
    def broken(self) -> bool:
        """Whether no more replies can be read; a server may have ended the stream while idle."""
        return self._broken or not (self._unanswered or self._frames.is_active())

    def _counted(self, frames: Iterator[bytes]) -> Iterator[bytes]:
        for frame in frames:
            self._link.count(len(frame), 0)
            yield frame

    def _answer(self, is_next: threading.Lock, reader: Reader) -> Body:
        """Read the reply to a request, after the replies to all requests before it."""
        body: Body | None = None
        try:
            is_next.acquire()
            body = self._read(reader)
        except grpc.RpcError as exc:
            raise self._link.error_of(exc, expired=self._expired) from exc
        finally:
            if body is None:  # it failed, or this thread was interrupted
                self._broken = True
                # The rest of this reply would be read as the next one otherwise.
                self._frames.cancel()
            with self._lock:
                self._unanswered.remove(is_next)
                self._await_next()
                self._broken |= self._expired
        return body

    def _read(self, reader: Reader) -> Body:
        for frame in self._frames:
            self._link.count(0, len(frame))
            if (body := reader.feed(frame)) is not None:
                return body
        raise self._link.error("UNAVAILABLE", "the server ended the stream")

    def end(self) -> None:
        """Cancel the call and end its threads."""
        self._ended.set()
        self._outbox.put(None)
        self._frames.cancel()
        self._watch.join()

    def _await_next(self) -> None:
        self._due = math.inf
        if self._unanswered:
            self._due = time.monotonic() + self._link.deadline_s
            # Open already if a request behind it was given up.
            if self._unanswered[0].locked():
                self._unanswered[0].release()

    def _end_if_late(self) -> None:
        # A request that begins during the wait is not due before its end.
        wait_s = self._link.deadline_s
        while not self._ended.wait(wait_s):
            with self._lock:
                left_s = self._due - time.monotonic()
                self._expired = left_s <= 0
            if self._expired:
                self._frames.cancel()
                return
            wait_s = min(left_s, self._link.deadline_s)
