"""The conversion of messages to frames of `fedsplit.proto` and back; each side copies tensors once.

The memory of a payload is allocated once, after the header was checked.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from fedsplit.errors import BadTensor, FedsplitError, ProtocolError, TooLarge, error_from_code
from fedsplit.telemetry.spans import SpanContext
from fedsplit.transport import fedsplit_pb2 as pb
from fedsplit.transport.envelope import read_frame, write_frame
from fedsplit.transport.layout import Kind, layout_of
from fedsplit.wire import messages
from fedsplit.wire import server_messages as servers
from fedsplit.wire.codec import TensorMeta, decode_tensor, described, encode_tensor
from fedsplit.wire.compression import NUMBERS
from fedsplit.wire.messages import KVCacheEntry, Limits, Reply, Request

CHUNK_BYTES = 1 << 20
"""The most payload in one frame of a stream; a longer one is sent in several frames."""

FRAME_BYTES = 4 << 20
"""The longest frame that either side receives."""

HEADER_BYTES = 256 << 10
"""The longest header of a frame, except one that names gradients or parameters in a reply.

Protobuf takes about 30 times the bytes of a header that repeats an empty message."""

ALIGNMENT = 8
"""Tensors begin at multiples of this, so that views of the buffer are aligned for any dtype."""

SERVICE = "fedsplit.v1.ComputeService"


@dataclass(frozen=True, slots=True)
class Call:
    """A method of the service; with `streams` it carries tensors and goes over Exchange."""

    method: str
    request: type[Request[Any]]
    reply: type[Reply]
    streams: bool


CALLS = {
    call.request: call
    for call in (
        Call("Open", messages.OpenRequest, messages.OpenReply, False),
        Call("Compute", messages.ForwardRequest, messages.ForwardReply, True),
        Call("Backward", messages.BackwardRequest, messages.BackwardReply, True),
        Call("Step", messages.StepRequest, messages.StepReply, True),
        Call("Generate", messages.GenerateRequest, messages.GenerateReply, True),
        Call("Close", messages.CloseRequest, messages.CloseReply, False),
        Call("GetGradients", messages.GradientsRequest, messages.GradientsReply, True),
        Call(
            "SyncTrainingState", messages.TrainingStateRequest, messages.TrainingStateReply, False
        ),
        Call("GetServiceInfo", messages.ServiceInfoRequest, messages.ServiceInfoReply, False),
        Call("Contribute", servers.ContributeRequest, messages.StepReply, True),
        Call("GetParameters", servers.ParametersRequest, servers.ParametersReply, True),
        Call("ReportWork", servers.WorkReportRequest, servers.WorkReportReply, True),
    )
}

Body = Request[Any] | Reply | FedsplitError

_CLASSES: dict[str, Any] = {
    cls.__name__: cls for call in CALLS.values() for cls in (call.request, call.reply)
}
_BODIES = {name.title().replace("_", ""): name for name in pb.Header.DESCRIPTOR.fields_by_name}


_DTYPES = {number: name.lower() for name, number in pb.DType.items()}
_CODECS = {number: name for name, number in NUMBERS.items()}


# --- writing ---------------------------------------------------------------------------------


def to_frames(message: Body, chunk_bytes: int = CHUNK_BYTES, trace: bytes = b"") -> Iterator[bytes]:
    """The frames of a message; `chunk_bytes` is the most payload in one frame.

    The first one has the `trace` of a request; empty for none.

    Raises:
        BadTensor: A tensor's dtype or shape may not be sent.
    """
    header = pb.Header(trace=trace)
    if isinstance(message, FedsplitError):
        _write_error(header.error, message)
        yield write_frame(header, [])
        return
    parts: list[memoryview] = []
    name = _BODIES[type(message).__name__]
    body = getattr(header, name)
    # A message without fields, such as CloseReply, would leave the oneof unset otherwise.
    body.SetInParent()
    _write_fields(body, message, parts)
    header.payload_bytes = sum(map(len, parts))
    if header.payload_bytes <= chunk_bytes:
        yield write_frame(header, parts)
        return
    offset = 0
    for pieces in _cut(parts, chunk_bytes):
        yield write_frame(header, pieces)
        offset += sum(len(piece) for piece in pieces)
        header = pb.Header(chunk=pb.Chunk(offset=offset))


def to_frame(message: Body, trace: bytes = b"") -> bytes:
    """The frame of a message in a unary call, with the `trace` of a request.

    Raises:
        BadTensor: A tensor's dtype or shape may not be sent.
        TooLarge: The message does not fit into one frame.
    """
    frame = next(to_frames(message, FRAME_BYTES, trace))
    if len(frame) > FRAME_BYTES:
        raise TooLarge(
            f"a {type(message).__name__} of more than {FRAME_BYTES} bytes does not fit into one "
            "frame; ask for it over Exchange"
        )
    return frame


def _write_error(body: pb.Error, error: FedsplitError) -> None:
    body.code, body.message = error.code, str(error)
    body.retry_after_ms = round(1000 * error.retry_after_s)


def _write_fields(body: Any, message: Any, parts: list[memoryview]) -> None:
    kind_of_message: Any = type(message)
    layout = layout_of(kind_of_message)
    for name in layout.values:
        setattr(body, name, getattr(message, name))
    for name, kind in layout.others:
        value = getattr(message, name)
        if not isinstance(value, Tensor) and not value:
            pass
        elif kind is Kind.TENSOR:
            codec, base = getattr(message, "codec", "none"), getattr(message, "base_BTD", None)
            getattr(body, name).CopyFrom(_write_tensor(value, parts, codec, base))
        elif kind is Kind.TENSORS:
            getattr(body, name).extend(_write_tensor(item, parts) for item in value)
        elif kind is Kind.VALUES:
            getattr(body, name).extend(value)
        elif kind is Kind.MAPPING:
            getattr(body, name).update(value)
        elif kind is Kind.LIMITS:
            _write_fields(getattr(body, name), value, parts)
        else:
            for item in value:
                _write_fields(getattr(body, name).add(), item, parts)


def _write_tensor(tensor: Tensor, parts: list[memoryview], *how: Any) -> pb.TensorMeta:
    meta, raw = encode_tensor(tensor, *how)
    parts.append(raw)
    if padding := -len(raw) % ALIGNMENT:
        parts.append(memoryview(bytes(padding)))
    return _written_meta(meta)


@lru_cache(maxsize=1024)
def _written_meta(meta: TensorMeta) -> pb.TensorMeta:
    """The description in protobuf; its readers copy it, so one is enough for equal tensors."""
    return pb.TensorMeta(
        dtype=meta.dtype.upper(),
        codec=NUMBERS[meta.codec],
        shape=meta.shape,
        nbytes=meta.nbytes,
    )


def _cut(parts: list[memoryview], size: int) -> Iterator[list[memoryview]]:
    """Groups of pieces of `parts`, in order; each has `size` bytes, the last one may have fewer."""
    group: list[memoryview] = []
    room = size
    for part in parts:
        while part:
            piece, part = part[:room], part[room:]
            group.append(piece)
            room -= len(piece)
            if not room:
                yield group
                group, room = [], size
    if group:
        yield group


# --- reading ---------------------------------------------------------------------------------


class Reader:
    """Assembles the frames of one stream, in order, to messages.

    Args:
        max_bytes: The longest payload to allocate memory for, in bytes, encoded and decoded.
        max_header: The longest header of a frame, in bytes.

    Attributes:
        sender: The span that the last message was sent in; None if it is not traced.
    """

    def __init__(self, max_bytes: int, max_header: int = HEADER_BYTES) -> None:
        self.max_bytes = max_bytes
        self.sender: SpanContext | None = None
        self._max_header = max_header
        self._pending: _Pending | None = None

    def feed(self, frame: bytes) -> Body | None:
        """Add a frame; return the message if it is complete.

        Raises:
            ProtocolError: The bytes are not a frame, or not one that is legal here.
            BadTensor: The header's tensors and the payload do not agree.
            TooLarge: The payload is longer than `max_bytes`, or a header than `max_header`.
        """
        header, payload = read_frame(frame, self._max_header)
        if header.WhichOneof("body") == "chunk":
            if self._pending is None:
                raise ProtocolError("a chunk came without a message before it")
            self._pending.add(header.chunk.offset, payload)
        elif self._pending is not None:
            raise ProtocolError(f"a new message came before the end of {self._pending}")
        elif header.WhichOneof("body") == "error":
            return _read_error(header.error)
        else:
            self.sender = SpanContext.read(header.trace)
            self._pending = _Pending(header, payload, self.max_bytes)
        if not self._pending.complete:
            return None
        message, self._pending = self._pending.message(), None
        return message

    def only(self, frame: bytes) -> Body:
        """The message in the one frame of a unary call.

        Raises:
            FedsplitError: As for `feed`; or the frame has only a part of a message.
        """
        message = self.feed(frame)
        if message is None:
            raise ProtocolError(
                "a unary call carries its whole payload in one frame; this one is too short"
            )
        return message


class _Pending:
    """A message whose header was checked and whose payload is incomplete."""

    def __init__(self, header: pb.Header, payload: memoryview, max_bytes: int) -> None:
        name = header.WhichOneof("body")
        if name is None:
            raise ProtocolError("a frame came without a message in its header")
        self._body = getattr(header, name)
        self._cls = _CLASSES[self._body.DESCRIPTOR.name]
        self._metas = [_read_meta(meta) for meta in _metas(self._cls, self._body)]
        self._total = decoded = 0
        for meta in self._metas:
            self._total += meta.nbytes + -meta.nbytes % ALIGNMENT
            decoded += meta.decoded_bytes
        if header.payload_bytes != self._total:
            raise BadTensor(
                f"{self._cls.__name__} announces {header.payload_bytes} bytes of payload, but "
                f"its tensors take {self._total}"
            )
        # A codec may expand a few bytes to many, so both sizes count.
        memory = max(self._total, decoded)
        if memory > max_bytes:
            raise TooLarge(
                f"{self._cls.__name__} carries {memory} bytes; at most {max_bytes} are allowed; "
                "raise generation.session_tokens (or for kv=client generation.stateless_bytes) at "
                "the trunk"
            )
        self._filled = 0
        self._buffer = self._first(payload)

    def _first(self, payload: memoryview) -> memoryview:
        # A copy, because gRPC owns the bytes and tensors need writable memory.
        if len(payload) == self._total:
            self._filled = self._total
            return memoryview(bytearray(payload))
        self._buffer = np.empty(self._total, dtype=np.uint8).data
        self.add(0, payload)
        return self._buffer

    def add(self, offset: int, payload: memoryview) -> None:
        """Add the payload that begins at `offset`."""
        end = offset + len(payload)
        if offset != self._filled or end > self._total or not payload:
            raise BadTensor(f"a chunk of bytes {offset} to {end} does not continue {self}")
        self._buffer[offset:end] = payload
        self._filled = end

    @property
    def complete(self) -> bool:
        """Whether all bytes were received."""
        return self._filled == self._total

    def message(self) -> Request[Any] | Reply:
        """The message; its tensors share the one buffer."""
        message: Request[Any] | Reply = self._cls(
            **_read_fields(self._cls, self._body, self._tensors())
        )
        return message

    def _tensors(self) -> Iterator[Tensor]:
        offset = 0
        for meta in self._metas:
            yield decode_tensor(meta, self._buffer, offset)
            offset += meta.nbytes + -meta.nbytes % ALIGNMENT

    def __str__(self) -> str:
        return (
            f"a {self._cls.__name__} of which {self._filled} of {self._total} bytes were received"
        )


def _read_error(body: pb.Error) -> FedsplitError:
    return error_from_code(body.code, body.message, body.retry_after_ms / 1000)


def _metas(cls: type, body: Any) -> Iterator[pb.TensorMeta]:
    """The descriptions of a body's tensors, in the order of their bytes."""
    for name, kind in layout_of(cls).others:
        if kind is Kind.TENSORS:
            yield from getattr(body, name)
        elif kind is Kind.ENTRIES:
            for entry in getattr(body, name):
                yield from _metas(KVCacheEntry, entry)
        elif kind is Kind.TENSOR and body.HasField(name):
            yield getattr(body, name)
        elif kind is Kind.TENSOR and name in layout_of(cls).needed:
            raise BadTensor(f"{cls.__name__} came without its {name}")


def _read_meta(meta: pb.TensorMeta) -> TensorMeta:
    # Five dimensions are enough for the check to refuse the shape, however long it is.
    shape = tuple(meta.shape[:5])
    dtype = _DTYPES.get(meta.dtype, str(meta.dtype))
    return described(dtype, shape, meta.nbytes, _CODECS.get(meta.codec, str(meta.codec)))


def _read_fields(cls: type, body: Any, tensors: Iterator[Tensor]) -> dict[str, Any]:
    layout = layout_of(cls)
    values = {name: getattr(body, name) for name in layout.values}
    for name, kind in layout.others:
        if kind is Kind.TENSOR:
            values[name] = next(tensors) if body.HasField(name) else None
        else:
            values[name] = _read_field(kind, getattr(body, name), tensors)
    return values


def _read_field(kind: Kind, value: Any, tensors: Iterator[Tensor]) -> Any:
    match kind:
        case Kind.TENSORS:
            return tuple(next(tensors) for _ in value)
        case Kind.VALUES:
            return tuple(value)
        case Kind.MAPPING:
            return dict(value)
        case Kind.LIMITS:
            return Limits(**_read_fields(Limits, value, tensors))
        case Kind.ENTRIES:
            return tuple(KVCacheEntry(**_read_fields(KVCacheEntry, e, tensors)) for e in value)
