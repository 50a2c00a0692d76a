"""The server of the transport: passes calls to a service and sends its replies."""

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import grpc
from grpc_health.v1 import health, health_pb2

from fedsplit.errors import ConfigError
from fedsplit.link import Service
from fedsplit.spec import LimitsSpec, WireSpec
from fedsplit.telemetry.sinks import SILENT, Telemetry
from fedsplit.transport.address import check_port
from fedsplit.transport.allocator import give_back
from fedsplit.transport.calls import SPARE_CALLS, STRANGERS, Calls
from fedsplit.transport.frames import FRAME_BYTES, HEADER_BYTES, SERVICE
from fedsplit.transport.tls import server_credentials
from fedsplit.wire.messages import Limits

OPTIONS = {
    "grpc.http2.min_recv_ping_interval_without_data_ms": 5000,
    # Pings of a client queue up while a busy server does not read; no strikes for them.
    "grpc.http2.max_ping_strikes": 0,
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.keepalive_time_ms": 10000,
    "grpc.keepalive_timeout_ms": 5000,
    "grpc.http2.ping_timeout_ms": 5000,
    "grpc.http2.max_pings_without_data": 0,
    # Of one frame, not of a message: gRPC holds this number in 32 bits.
    "grpc.max_receive_message_length": FRAME_BYTES,
    # A message that gRPC decompresses may have a thousand times the bytes that were received.
    "grpc.compression_enabled_algorithms_bitset": 1,
    # A connection that says nothing holds a descriptor.
    "grpc.server_handshake_timeout_ms": 10000,
    "grpc.max_connection_idle_ms": 300000,
    "grpc.max_concurrent_streams": 256,
    "grpc.so_reuseport": 0,
}
_BUDGETS = LimitsSpec()
_GIVE_BACK_S = 60.0
"""Seconds from one time that free memory is given back to the next; it takes milliseconds."""


class GrpcServer:
    """Serves one trunk service over gRPC, next to the standard health service.

    The health service reports the status of the server, and of each trunk under its name.

    Args:
        service: The trunk service.
        wire: The address to listen on, and TLS.
        limits: The largest request; memory is not allocated for a longer one.
        max_clients: The most streams at a time; another one is refused with `OVERLOADED`, unless
            a silent one gives way.
        budgets: What a client may take up.
        payload_of: Returns the longest payload for a token that may send longer ones than the
            limits allow, or 0.
        telemetry: Receives an event for each request.
    """

    def __init__(
        self,
        service: Service,
        *,
        wire: WireSpec,
        limits: Limits,
        max_clients: int,
        budgets: LimitsSpec = _BUDGETS,
        payload_of: Callable[[str], int] = lambda token: 0,
        telemetry: Telemetry = SILENT,
    ) -> None:
        self._wire = wire
        self._trunks = service.trunks
        self._health = health.HealthServicer()
        max_bytes = largest_payload(limits, with_bases=bool(wire.history_bytes))
        self._calls = Calls(
            service,
            self._health,
            budgets,
            max_bytes=max_bytes,
            payload_of=payload_of,
            max_streams=max_clients,
            telemetry=telemetry,
        )
        # A call occupies a thread. One that was ended does so for a moment without a slot.
        workers = max_clients + (max_clients + SPARE_CALLS) + 2 * STRANGERS
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="fedsplit-call")
        # Between the two, gRPC would refuse calls at random.
        sizes = ("grpc.max_metadata_size", "grpc.absolute_max_metadata_size")
        options = {**OPTIONS, **dict.fromkeys(sizes, budgets.metadata_bytes)}
        self._server = grpc.server(self._pool, options=tuple(options.items()))
        self._server.add_generic_rpc_handlers((self._calls,))
        self._tick_s = min(1.0, budgets.body_s / 4, budgets.idle_s / 4)
        self._stopped = threading.Event()
        self._timer = threading.Thread(target=self._expire, name="fedsplit-timer", daemon=True)

    def start(self) -> str:
        """Listen; return the address, host:port as bound or unix:path.

        Raises:
            ConfigError: The address is not available, or a TLS file cannot be read.
        """
        bind = self._wire.bind
        check_port("wire.bind=", bind)
        check_port("wire.advertise=", self._wire.advertise)
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
        self._timer.start()
        for name in {"", SERVICE, *self._trunks}:
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        for name, ended in self._trunks.items():
            ended.add_done_callback(partial(self._trunk_ended, name))
        return bind if bind.startswith("unix:") else f"{bind.rpartition(':')[0]}:{port}"

    @property
    def usage(self) -> dict[str, int]:
        """The slots that are taken: of streams, of other calls, and of calls without a token."""
        return self._calls.usage

    def _expire(self) -> None:
        """End late calls, with one thread for the deadlines of all; give back free memory."""
        given_back = time.monotonic()
        while not self._stopped.wait(self._tick_s):
            self._calls.expire()
            if time.monotonic() - given_back > _GIVE_BACK_S:
                give_back()
                given_back = time.monotonic()

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
        self._stopped.set()
        # It has not begun after a start that failed.
        if self._timer.is_alive():
            self._timer.join()


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
