"""The server of the transport: passes calls to a service and sends its replies."""

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedsplit.errors import ConfigError, Draining, FedsplitError, Internal, ProtocolError
from fedsplit.link import Service
from fedsplit.spec import WireSpec
from fedsplit.transport.frames import (
    CALLS,
    FRAME_BYTES,
    SERVICE,
    Body,
    Call,
    Reader,
    from_frame,
    to_frame,
    to_frames,
)
from fedsplit.transport.status import MAX_METADATA_BYTES, TOKEN_KEY, abort
from fedsplit.transport.streams import Streams
from fedsplit.transport.tls import server_credentials
from fedsplit.wire.messages import CloseRequest, Limits, Reply, Request

log = logging.getLogger(__name__)

OPTIONS = {
    "grpc.http2.min_recv_ping_interval_without_data_ms": 5000,
    # Pings of a client queue up while a busy server does not read; no strikes for them.
    "grpc.http2.max_ping_strikes": 0,
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.keepalive_time_ms": 10000,
    "grpc.keepalive_timeout_ms": 5000,
    "grpc.http2.ping_timeout_ms": 5000,
    "grpc.http2.max_pings_without_data": 0,
    "grpc.max_metadata_size": MAX_METADATA_BYTES,
    # Of one frame, not of a message: gRPC holds this number in 32 bits.
    "grpc.max_receive_message_length": FRAME_BYTES,
    "grpc.so_reuseport": 0,
}
HEADER_BYTES = 1 << 20
"""Bytes for all parts of a message but its tensors."""


class GrpcServer:
    """Serves one trunk service over gRPC, next to the standard health service.

    The health service reports the status of the server, and of each trunk under its name.

    Args:
        service: The trunk service.
        wire: The address to listen on, and TLS.
        limits: The largest request; memory is not allocated for a longer one.
        max_clients: The most streams at a time; another one is refused with `OVERLOADED`.
    """

    def __init__(
        self, service: Service, *, wire: WireSpec, limits: Limits, max_clients: int
    ) -> None:
        self._wire = wire
        self._trunks = service.trunks
        self._health = health.HealthServicer()
        max_bytes = largest_payload(limits, with_bases=bool(wire.history_bytes))
        self._calls = _Calls(service, max_bytes=max_bytes, max_clients=max_clients)
        # A stream occupies a thread, also for a while after its client has gone, and unary calls
        # need some more.
        workers = 2 * max_clients + 8
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="fedsplit-call")
        self._server = grpc.server(
            self._pool,
            maximum_concurrent_rpcs=workers,
            options=tuple(OPTIONS.items()),
        )
        self._server.add_generic_rpc_handlers((self._calls.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    def start(self) -> str:
        """Listen; return the address, host:port as bound or unix:path.

        Raises:
            ConfigError: The address is not available, or a TLS file cannot be read.
        """
        bind = self._wire.bind
        _require_free(bind)
        try:
            if self._wire.tls_cert:
                port = self._server.add_secure_port(bind, server_credentials(self._wire))
            else:
                port = self._server.add_insecure_port(bind)
        except RuntimeError as exc:
            raise ConfigError(
                f"wire.bind={bind} cannot be listened on: {_why_not(bind) or exc}; choose another "
                "address, or port 0 for a free port"
            ) from exc
        self._server.start()
        for name in {"", SERVICE, *self._trunks}:
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        for name, ended in self._trunks.items():
            ended.add_done_callback(partial(self._trunk_ended, name))
        return bind if bind.startswith("unix:") else f"{bind.rpartition(':')[0]}:{port}"

    def _trunk_ended(self, name: str, ended: "Future[None]") -> None:
        """Report a trunk that failed as not serving, and the server once all trunks have failed."""
        if ended.exception() is None:
            return
        others = [other for other in self._trunks.values() if not other.done()]
        for service in {name} if others else {"", SERVICE, name}:
            self._health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)

    def stop(self, grace_s: float = 5.0) -> None:
        """Refuse new calls, wait up to `grace_s` seconds for calls in progress, and disconnect."""
        self._health.enter_graceful_shutdown()
        self._calls.drain(grace_s)
        # With a grace of 0 gRPC would start a thread, which a process without memory cannot.
        self._server.stop(grace=None)
        # Not waited for: a call may block until the service stops, which happens after this.
        self._pool.shutdown(wait=False)


def _why_not(bind: str) -> str:
    """Return the operating system's reason against an address, which gRPC does not tell."""
    host, _, port = bind.rpartition(":")
    try:
        with socket.socket(socket.AF_INET6 if "[" in host else socket.AF_INET) as probe:
            probe.bind((host.strip("[]"), int(port)))
    except (OSError, ValueError) as exc:
        return getattr(exc, "strerror", None) or str(exc)
    return ""


def _require_free(bind: str) -> None:
    """Refuse the Unix socket of a server that is alive; gRPC would take it away from that server.

    The file of a server that has ended is replaced.

    Raises:
        ConfigError: A server listens on this socket.
    """
    kind, _, path = bind.partition(":")
    if kind != "unix":
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return
    raise ConfigError(
        f"wire.bind={bind} cannot be listened on: another server listens there; stop it, or choose "
        "another path"
    )


def largest_payload(limits: Limits, *, with_bases: bool = False) -> int:
    """Bytes of the largest legal request, plus a quarter.

    Args:
        limits: The limits of requests.
        with_bases: Whether a forward may carry references, up and down in bfloat16.
    """
    per_token = 4 * limits.hidden_size + 2 * 8  # float32, and an int64 for mask and position
    in_training = per_token + (2 * 2 * limits.hidden_size if with_bases else 0)
    in_batch = limits.max_rows * limits.max_tokens * in_training
    payload = max(in_batch, limits.session_tokens * per_token) * 5 // 4
    return max(payload, limits.stateless_bytes) + HEADER_BYTES


class _Calls:
    """The handlers of calls between gRPC and the service."""

    def __init__(self, service: Service, *, max_bytes: int, max_clients: int) -> None:
        self._max_bytes = max_bytes
        self._service = service
        self._streams = Streams(max_clients, service.disconnected)
        self._draining = False
        self._in_work = 0
        self._changed = threading.Condition()

    def handlers(self) -> "grpc.GenericRpcHandler[bytes, bytes]":
        """The handlers of all methods; gRPC passes messages as bytes."""
        unary = {
            call.method: grpc.unary_unary_rpc_method_handler(self._unary(call))
            for call in CALLS.values()
        }
        exchange = grpc.stream_stream_rpc_method_handler(self._exchange)
        return grpc.method_handlers_generic_handler(SERVICE, {"Exchange": exchange, **unary})

    def drain(self, grace_s: float) -> None:
        """Refuse calls from now on, and wait for calls in progress."""
        with self._changed:
            self._draining = True
            self._changed.wait_for(lambda: self._in_work == 0, timeout=grace_s)

    def _unary(self, call: Call) -> Callable[[bytes, grpc.ServicerContext], bytes]:
        def answer(frame: bytes, context: grpc.ServicerContext) -> bytes:
            try:
                message = from_frame(frame, self._max_bytes)
                if not isinstance(message, call.request):
                    raise ProtocolError(f"{call.method} takes a {call.request.__name__}")
                with self._working():
                    reply = self._answer(message, context)
                return to_frame(reply)
            except FedsplitError as error:
                abort(context, error)

        return answer

    def _exchange(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        stream, reader = object(), Reader(self._max_bytes)
        try:
            # Before the first read, so that a stranger cannot make the server allocate memory.
            self._service.check_token(_token_of(context))
            self._streams.enter(stream)
            # Runs when the client goes away, while this thread may wait in the service.
            context.add_callback(lambda: self._streams.leave(stream))
            for frame in frames:
                if (message := reader.feed(frame)) is not None:
                    # Until the reply is sent: a drain waits for that as well.
                    with self._working():
                        yield from to_frames(self._stream_answer(message, stream, context))
        except FedsplitError as error:
            abort(context, error)
        finally:
            self._streams.leave(stream)

    def _stream_answer(self, message: Body, stream: object, context: grpc.ServicerContext) -> Body:
        try:
            reply = self._answer(message, context)
        except FedsplitError as error:
            return error
        session = getattr(message, "session", "")
        if session and not isinstance(message, CloseRequest):
            self._streams.carry(session, stream)
        return reply

    def _answer(self, message: Body, context: grpc.ServicerContext) -> Reply:
        if not isinstance(message, Request):
            raise ProtocolError(f"{type(message).__name__} is not a request")
        try:
            reply: Reply = self._service.handle(message, _token_of(context))
        except FedsplitError:
            raise
        except Exception as exc:
            log.exception("a %s failed", type(message).__name__)
            raise Internal("the trunk server failed; its log has the details") from exc
        if isinstance(message, CloseRequest):
            self._streams.close(message.session)
        return reply

    @contextmanager
    def _working(self) -> Iterator[None]:
        with self._changed:
            if self._draining:
                raise Draining("the trunk server is shutting down; try again when it is back")
            self._in_work += 1
        try:
            yield
        finally:
            with self._changed:
                self._in_work -= 1
                self._changed.notify_all()


def _token_of(context: grpc.ServicerContext) -> str:
    return str(dict(context.invocation_metadata()).get(TOKEN_KEY, ""))
