"""Spans: the times of what a step or a request passes through, in each process that it crosses.

The spans of a step form a trace. A client begins one if a sink of it wants it, and sends the ids
with each request, so that the spans of the server are in the same trace. Without such a sink, no
id is drawn and nothing is sent.
"""

import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType

from fedsplit.errors import FedsplitError, Internal, ProtocolError
from fedsplit.telemetry.context import current_fields, shown
from fedsplit.telemetry.events import SpanEnded
from fedsplit.telemetry.sinks import Telemetry

TRACE_ID_BYTES, SPAN_ID_BYTES = 16, 8
"""The lengths of ids, those of W3C Trace Context."""

_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class SpanContext:
    """The ids of a span: that of its trace, and its own."""

    trace_id: bytes
    span_id: bytes

    @classmethod
    def read(cls, raw: bytes) -> "SpanContext | None":
        """Return the ids that a request came with; None if it came without.

        Raises:
            ProtocolError: The bytes are no ids.
        """
        if not raw:
            return None
        if len(raw) != TRACE_ID_BYTES + SPAN_ID_BYTES:
            raise ProtocolError(
                f"a request came with a trace of {len(raw)} bytes; it has "
                f"{TRACE_ID_BYTES + SPAN_ID_BYTES} or none"
            )
        return cls(raw[:TRACE_ID_BYTES], raw[TRACE_ID_BYTES:])

    def __bytes__(self) -> bytes:
        return self.trace_id + self.span_id


class Span:
    """A span that has begun.

    As a context manager it is the current span of its thread, and ends with the block.

    Args:
        telemetry: Receives the span when it ends, and those below it.
        name: What it is the time of, such as forward.
        trace_id: The id of its trace.
        parent_id: The id of the span above it; empty for the first one of a trace.
        fields: What it is about.

    Attributes:
        telemetry: As above.
        context: Its ids.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        name: str,
        *,
        trace_id: bytes,
        parent_id: bytes,
        fields: Mapping[str, object],
    ) -> None:
        self.telemetry = telemetry
        self.context = SpanContext(trace_id, secrets.token_bytes(SPAN_ID_BYTES))
        self._name = name
        self._parent_id = parent_id
        self._fields = {**current_fields(), **shown(fields)}
        self._began_ns = time.time_ns()
        self._before: Token[Span | None] | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> "Span":
        self._before = _CURRENT.set(self)
        return self

    def __exit__(
        self, _: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._before
        _CURRENT.reset(self._before)
        self.end(exc or self._failure)

    def active(self) -> AbstractContextManager[None]:
        """A context in which it is the current span; it goes on after it."""
        return _active(self)

    def fail(self, failure: BaseException) -> None:
        """Note the failure for the end of its block, which no exception ends."""
        self._failure = failure

    def below(self, name: str, **fields: object) -> "Span":
        """Begin a span below it."""
        return Span(
            self.telemetry,
            name,
            trace_id=self.context.trace_id,
            parent_id=self.context.span_id,
            fields=fields,
        )

    def end(self, failure: BaseException | None = None) -> None:
        """End it, with the failure that ended it if there is one."""
        self._emit(self._name, self.context.span_id, self._parent_id, self._began_ns, failure)

    def record(self, name: str, *, seconds: float, ago_s: float = 0.0) -> None:
        """Add a span below it that took so many seconds, and ended `ago_s` seconds ago."""
        began_ns = time.time_ns() - round((ago_s + seconds) * _NS)
        own_id = secrets.token_bytes(SPAN_ID_BYTES)
        self._emit(name, own_id, self.context.span_id, began_ns, None, round(seconds * _NS))

    def _emit(
        self,
        name: str,
        span_id: bytes,
        parent_id: bytes,
        began_ns: int,
        failure: BaseException | None,
        took_ns: int | None = None,
    ) -> None:
        ended_ns = time.time_ns() if took_ns is None else began_ns + took_ns
        self.telemetry.emit(
            SpanEnded(
                name=name,
                trace_id=self.context.trace_id,
                span_id=span_id,
                parent_id=parent_id,
                began_ns=began_ns,
                ended_ns=ended_ns,
                code=_code_of(failure),
                fields=self._fields,
            )
        )


class _Untraced(Span):
    """In place of a span where nothing is traced; all its methods do nothing."""

    def __init__(self) -> None:
        self.context = SpanContext(b"", b"")

    def __enter__(self) -> Span:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def active(self) -> AbstractContextManager[None]:
        return nullcontext()

    def fail(self, failure: BaseException) -> None:
        pass

    def below(self, name: str, **fields: object) -> Span:
        return self

    def end(self, failure: BaseException | None = None) -> None:
        pass

    def record(self, name: str, *, seconds: float, ago_s: float = 0.0) -> None:
        pass


class _Unwanted(_Untraced):
    """The first span of a trace that no sink wants: no span in its block begins another one."""

    def __enter__(self) -> Span:
        self._before = _CURRENT.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._before
        _CURRENT.reset(self._before)

    def below(self, name: str, **fields: object) -> Span:
        return UNTRACED


@contextmanager
def _active(span: Span) -> Iterator[None]:
    before = _CURRENT.set(span)
    try:
        yield
    finally:
        _CURRENT.reset(before)


UNTRACED = _Untraced()
_CURRENT: ContextVar["Span | None"] = ContextVar("span", default=None)


def current() -> Span:
    """Return the current span of the calling thread, or `UNTRACED`."""
    return _CURRENT.get() or UNTRACED


def sent_ids() -> bytes:
    """Return the ids of the current span for a request; empty without one."""
    return bytes(current().context)


def span(telemetry: Telemetry, name: str, **fields: object) -> Span:
    """Begin a span below the current one.

    Without a current one, it is the first of a new trace, if a sink of `telemetry` wants it.
    """
    if above := _CURRENT.get():
        return above.below(name, **fields)
    if not telemetry.takes_traces:
        return UNTRACED
    # Not from a generator that training uses.
    trace_id = secrets.token_bytes(TRACE_ID_BYTES)
    if not telemetry.wants_trace(trace_id):
        return _Unwanted()
    return Span(telemetry, name, trace_id=trace_id, parent_id=b"", fields=fields)


def continued(
    telemetry: Telemetry, sender: SpanContext | None, name: str, **fields: object
) -> Span:
    """Begin a span below that of a request's sender, if there is one and a sink wants its trace."""
    if not sender or not telemetry.wants_trace(sender.trace_id):
        return UNTRACED
    return Span(telemetry, name, trace_id=sender.trace_id, parent_id=sender.span_id, fields=fields)


def _code_of(failure: BaseException | None) -> str:
    if failure is None:
        return "OK"
    return failure.code if isinstance(failure, FedsplitError) else Internal.code
