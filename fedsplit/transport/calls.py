"""The calls of the trunk's service: which are admitted, and how requests get to the service.

The token is in a call's metadata, so it is checked before anything else of the call is read. A
caller without a token may only ask for the service's info and health. Such calls have slots of
their own, and so do calls with one request, and streams.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import grpc
from grpc_health.v1 import health

from fedsplit.errors import Draining, FedsplitError, Internal, ProtocolError, Unauthenticated
from fedsplit.link import Service
from fedsplit.spec import LimitsSpec
from fedsplit.telemetry.context import current_fields, working_on
from fedsplit.telemetry.events import FramesMoved, RequestAnswered
from fedsplit.telemetry.sinks import SILENT, Telemetry
from fedsplit.telemetry.spans import Span, SpanContext, continued
from fedsplit.transport.frames import (
    CALLS,
    FRAME_BYTES,
    SERVICE,
    Body,
    Call,
    Reader,
    to_frame,
    to_frames,
)
from fedsplit.transport.rpcs import HealthCheck, Refusal, Rpc
from fedsplit.transport.slots import Slots
from fedsplit.transport.status import TOKEN_KEY
from fedsplit.transport.streams import Streams
from fedsplit.transport.versions import versions
from fedsplit.wire.messages import (
    CloseRequest,
    Reply,
    Request,
    ServiceInfoReply,
    ServiceInfoRequest,
)

log = logging.getLogger(__name__)

SPARE_CALLS = 8
"""Slots for calls with one request, beside one for each stream."""

STRANGERS = 16
"""Slots for callers without a token."""


class Calls(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the stubs only
    """Admits calls, and passes their requests to the service.

    Args:
        service: The trunk service.
        servicer: The status of the health service.
        limits: What a client may take up.
        max_bytes: The longest payload of a request.
        payload_of: Returns the longest payload for a token that may send longer ones, or 0.
        max_streams: The most streams at a time.
        telemetry: Receives an event for each request.
    """

    def __init__(
        self,
        service: Service,
        servicer: health.HealthServicer,
        limits: LimitsSpec,
        *,
        max_bytes: int,
        payload_of: Callable[[str], int],
        max_streams: int,
        telemetry: Telemetry = SILENT,
    ) -> None:
        self._payload_of = payload_of
        self.max_bytes = max_bytes
        self.limits = limits
        self.sessions = Streams(service.disconnected)
        self.check_token = service.check_token
        self._service = service
        self._servicer = servicer
        self._telemetry = telemetry
        self._fields = current_fields()
        body_s, calls = limits.body_s, limits.calls_per_client
        self.streams = Slots(
            "streams",
            total=max_streams,
            per_client=limits.streams_per_client,
            settled_s=body_s,
        )
        self.calls = Slots(
            "calls", total=max_streams + SPARE_CALLS, per_client=calls, settled_s=body_s
        )
        self.strangers = Slots(
            "calls without a token", total=STRANGERS, per_client=STRANGERS, settled_s=body_s
        )
        self._methods: dict[str, Callable[[str], Rpc]] = {
            f"/{SERVICE}/Exchange": lambda token: _Exchange(self, token),
            f"/{health.SERVICE_NAME}/Check": lambda _: HealthCheck(
                self._servicer, self.strangers, self.limits
            ),
            **{f"/{SERVICE}/{call.method}": self._unary(call) for call in CALLS.values()},
        }
        self._most_metadata = 0
        self._draining = False
        self._in_work = 0
        self._lock = threading.Lock()  # guards `_draining` and `_in_work`
        self._at_rest = threading.Condition(self._lock)

    # --- admission, in the one thread of gRPC that takes calls --------------------------------

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> "grpc.RpcMethodHandler[bytes, bytes] | None":
        """Admit or refuse a call, of which only the metadata has arrived."""
        method = self._methods.get(handler_call_details.method)
        if method is None:
            return None
        items = handler_call_details.invocation_metadata or ()
        size = sum(len(key) + len(value) for key, value in items)
        self._most_metadata = max(self._most_metadata, size)
        metadata = dict(items)
        rpc: Rpc | Refusal
        try:
            rpc = method(str(metadata.get(TOKEN_KEY, "")))
        except FedsplitError as error:
            rpc = Refusal(error)
            self._answered("admission", error.code, 0.0)
        # For gRPC every call is a stream, so that it does not wait for the body.
        return grpc.stream_stream_rpc_method_handler(rpc)

    def _unary(self, call: Call) -> Callable[[str], Rpc]:
        def admitted(token: str) -> Rpc:
            try:
                client = self.check_token(token)
            except Unauthenticated:
                if call.request is not ServiceInfoRequest:
                    raise
                return _Unary(self, call, token, "", self.strangers, max_bytes=0)
            return _Unary(self, call, token, client, self.calls, max_bytes=self.max_bytes)

        return admitted

    # --- the way to the service ---------------------------------------------------------------

    @contextmanager
    def serving(self, message: Body, client: str, sender: SpanContext | None) -> Iterator[Span]:
        """A context of a request until its reply is sent, for the log, traces and `drain`.

        Raises:
            Draining: The server shuts down.
        """
        with self._lock:
            if self._draining:
                raise Draining("the trunk server is shutting down; try again when it is back")
            self._in_work += 1
        session, call = getattr(message, "session", ""), getattr(message, "call", None)
        try:
            with (
                working_on(**{**self._fields, "client": client, "session": session, "call": call}),
                continued(self._telemetry, sender, "serve", kind=_kind_of(message)) as span,
            ):
                yield span
        finally:
            with self._lock:
                self._in_work -= 1
                if self._draining:
                    self._at_rest.notify_all()

    def answer(self, message: Body, token: str) -> Reply:
        """The service's reply to a request.

        Raises:
            FedsplitError: The request is refused.
        """
        if not isinstance(message, Request):
            raise ProtocolError(f"{type(message).__name__} is not a request")
        began, code = time.monotonic(), Internal.code
        try:
            reply: Reply = self._service.handle(message, token)
            code = "OK"
        except FedsplitError as error:
            code = error.code
            raise
        except Exception as exc:
            log.exception("a %s failed", type(message).__name__)
            raise Internal("the trunk server failed; its log has the details") from exc
        finally:
            self._answered(_kind_of(message), code, time.monotonic() - began)
        if isinstance(message, CloseRequest):
            self.sessions.close(message.session)
        if isinstance(reply, ServiceInfoReply) and reply.budgets:
            budgets = {**reply.budgets, **self._in_use()}
            return replace(reply, budgets=budgets, versions=versions(), time_s=time.time())
        return reply

    def reader_for(self, token: str) -> Reader:
        """Return a reader of the requests on a stream."""
        if not (most := self._payload_of(token)):
            return Reader(self.max_bytes)
        return Reader(max(most, self.max_bytes), FRAME_BYTES)

    def count(self, rpc: Rpc, message: Body | None, reply: Body | None) -> None:
        """Report the frames of a request, and of its reply if there is one."""
        if self._telemetry and any(counts := rpc.take_counts()):
            moved = FramesMoved(
                kind=_kind_of(message),
                received_bytes=counts[0],
                received_codec=getattr(message, "codec", "none"),
                sent_bytes=counts[1],
                sent_codec=getattr(reply, "codec", "none"),
            )
            self._telemetry.emit(moved)

    def _answered(self, kind: str, code: str, seconds: float) -> None:
        if self._telemetry:
            self._telemetry.emit(RequestAnswered(kind=kind, code=code, seconds=seconds))

    def _in_use(self) -> dict[str, str]:
        """Return how much of each limit of calls is in use, by the setting of the limit."""
        limits, idle_s = self.limits, self.streams.longest_silence("limits.idle_s")
        return {
            **self.streams.in_use(),
            **self.calls.in_use(),
            "limits.idle_s": f"{idle_s:.0f} of {limits.idle_s:g}",
            "limits.metadata_bytes": f"{self._most_metadata} of {limits.metadata_bytes}",
        }

    def drain(self, grace_s: float) -> None:
        """Refuse requests from now on, and wait up to `grace_s` seconds for those in work."""
        with self._lock:
            self._draining = True
            self._at_rest.wait_for(lambda: self._in_work == 0, timeout=grace_s)

    def expire(self) -> None:
        """End the calls whose peers are late."""
        for slots in (self.streams, self.calls, self.strangers):
            slots.expire()

    @property
    def usage(self) -> dict[str, int]:
        """The slots that are taken, by what holds them."""
        return {slots.what: len(slots) for slots in (self.streams, self.calls, self.strangers)}


class _Unary(Rpc):
    """A call with one request and one reply, each in one frame."""

    def __init__(
        self, calls: Calls, call: Call, token: str, client: str, slots: Slots, *, max_bytes: int
    ) -> None:
        self._calls = calls
        self._call = call
        self._token = token
        self._max_bytes = max_bytes
        super().__init__(slots, calls.limits, client)

    def serve(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> None:
        """See `Rpc`."""
        message = reply = None
        try:
            frame = self.receive(frames)
            if frame is None:
                raise ProtocolError(f"{self._call.method} came without a message")
            reader = Reader(self._max_bytes)
            message = reader.only(frame)
            if not isinstance(message, self._call.request):
                raise ProtocolError(f"{self._call.method} takes a {self._call.request.__name__}")
            is_client = self._slots is self._calls.calls
            sender = reader.sender if is_client else None
            with self._calls.serving(message, self._client, sender) as span:
                reply = self._calls.answer(message, self._token)
                # Or a new call could end this one before its reply is taken.
                if is_client:
                    self.settle()
                with span.below("reply"):
                    self.send(to_frame(reply))
        finally:
            self._calls.count(self, message, reply)


class _Exchange(Rpc):
    """A stream of requests, answered one after another in their order."""

    def __init__(self, calls: Calls, token: str) -> None:
        self._calls = calls
        self._token = token
        super().__init__(calls.streams, calls.limits, calls.check_token(token))

    def serve(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> None:
        """See `Rpc`."""
        sessions, reader, idle = self._calls.sessions, self._calls.reader_for(self._token), False
        sessions.enter(self)
        # Runs when the client goes away, while this thread may wait in the service.
        context.add_callback(lambda: sessions.leave(self))
        try:
            while (frame := self.receive(frames, idle=idle)) is not None:
                message = reader.feed(frame)
                if idle := message is not None:
                    # Until the reply is sent: a drain waits for that as well.
                    with self._calls.serving(message, self._client, reader.sender) as span:
                        reply = self._answer(message)
                        if isinstance(reply, FedsplitError):
                            span.fail(reply)
                        with span.below("reply"):
                            for sent in to_frames(reply):
                                self.send(sent)
                    self._calls.count(self, message, reply)
        finally:
            # What was received or sent in part.
            self._calls.count(self, None, None)
            sessions.leave(self)

    def _answer(self, message: Body) -> Body:
        try:
            reply = self._calls.answer(message, self._token)
        except FedsplitError as error:
            return error
        self.settle()
        session = getattr(message, "session", "")
        if session and not isinstance(message, CloseRequest):
            self._calls.sessions.carry(session, self)
        return reply


def _kind_of(message: Body | None) -> str:
    return message.kind if isinstance(message, Request) else "invalid"
