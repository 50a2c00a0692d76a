"""The bytes of one frame: its header as protobuf, then the payload as the last field.

A protobuf object with a tensor in it takes longer to build than to send. So protobuf serializes
only the small header, and the payload is appended as the last field's tag, length and bytes. The
result is the same valid protobuf.
"""

from google.protobuf.message import DecodeError

from fedsplit.errors import ProtocolError, TooLarge
from fedsplit.transport import fedsplit_pb2 as pb

_HEADER_TAG, _PAYLOAD_TAG = 0x0A, 0x12  # fields 1 and 2, both length-delimited
_FIXED_BYTES = {1: 8, 5: 4}
_MAX_FIELDS = 16
"""The most fields of a frame of another writer, which may have fields that are unknown here."""


def write_frame(header: pb.Header, payload: list[memoryview]) -> bytes:
    """The frame of a header and the pieces of its payload, which are copied once."""
    head = header.SerializeToString()
    start = (b"%c" % _HEADER_TAG, _varint(len(head)), head)
    if not payload:
        return b"".join(start)
    length = _varint(sum(map(len, payload)))
    return b"".join((*start, b"%c" % _PAYLOAD_TAG, length, *payload))


def read_frame(frame: bytes, max_header: int) -> tuple[pb.Header, memoryview]:
    """Header and payload, without a copy of the payload.

    Protobuf reads the header only, once its length is known: its objects for a repeated empty
    message take 30 times the bytes of the message.

    Args:
        frame: The bytes of the frame.
        max_header: The longest header to read, in bytes.

    Raises:
        ProtocolError: The bytes are not a frame.
        TooLarge: The header is longer than `max_header`.
    """
    try:
        headers, payload = _split(memoryview(frame))
        if (length := sum(map(len, headers))) > max_header:
            raise TooLarge(
                f"a frame with a header of {length} bytes came; at most {max_header} are allowed"
            )
        # Protobuf merges a field that comes twice, as if its bytes were joined.
        return pb.Header.FromString(b"".join(headers)), payload
    except DecodeError as exc:
        raise ProtocolError(f"{len(frame)} bytes came that are not a frame") from exc


def _split(view: memoryview) -> tuple[list[memoryview], memoryview]:
    """The bytes of the fields 1 and 2 of a frame; other fields are skipped."""
    headers: list[memoryview] = []
    payload, at = view[:0], 0
    for _ in range(_MAX_FIELDS):
        if at >= len(view):
            break
        tag, begin = _read_varint(view, at)
        kind = tag & 7
        if kind == 0:
            at = _read_varint(view, begin)[1]
        elif kind == 2:
            length, begin = _read_varint(view, begin)
            at = begin + length
        elif kind in _FIXED_BYTES:
            at = begin + _FIXED_BYTES[kind]
        else:
            break
        if tag == _HEADER_TAG:
            headers.append(view[begin:at])
        elif tag == _PAYLOAD_TAG:
            payload = view[begin:at]
    if at != len(view):
        raise DecodeError("a field does not end where the frame ends")
    return headers, payload


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    """The number at `at`, and the place after it."""
    # Most numbers are one byte.
    if at < len(view) and (value := view[at]) < 0x80:
        return value, at + 1
    value = 0
    # Five bytes of a varint hold 35 bits, more than any frame's length.
    for i, byte in enumerate(view[at : at + 5]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, at + i + 1
    raise DecodeError("a number is too long, or cut off")
