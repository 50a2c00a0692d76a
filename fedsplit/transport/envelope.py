"""The bytes of one frame: its header as protobuf, then the payload as the last field.

A protobuf object with a tensor in it takes longer to build than to send. So protobuf serializes
only the small header, and the payload is appended as the last field's tag, length and bytes. The
result is the same valid protobuf.
"""

from google.protobuf.message import DecodeError

from fedsplit.errors import ProtocolError
from fedsplit.transport import fedsplit_pb2 as pb


def write_frame(header: pb.Header, payload: list[memoryview]) -> bytes:
    """The frame of a header and the pieces of its payload, which are copied once."""
    head = header.SerializeToString()
    # 0x0a and 0x12 are the tags of fields 1 (header) and 2 (payload), both length-delimited.
    start = b"\x0a" + _varint(len(head)) + head
    if not payload:
        return start
    return b"".join((start, b"\x12", _varint(sum(map(len, payload))), *payload))


def read_frame(frame: bytes) -> tuple[pb.Header, memoryview]:
    """Header and payload, without a copy if the frame has the layout of `write_frame`.

    Raises:
        ProtocolError: The bytes are not a frame.
    """
    view = memoryview(frame)
    start, end = _span(view, 0, 0x0A)
    begin, stop = (end, end) if end == len(view) else _span(view, end, 0x12)
    try:
        if start and stop == len(view):
            return pb.Header.FromString(frame[start:end]), view[begin:stop]
        # Legal protobuf of another writer: fields in another order, or unknown ones.
        other = pb.Frame.FromString(frame)
        return other.header, memoryview(other.payload)
    except DecodeError as exc:
        raise ProtocolError(f"{len(frame)} bytes came that are not a frame") from exc


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _span(view: memoryview, at: int, tag: int) -> tuple[int, int]:
    """Begin and end of the length-delimited field at `at`; (0, 0) if `tag` is not there."""
    if at >= len(view) or view[at] != tag:
        return 0, 0
    length = 0
    # Five bytes of a varint hold 35 bits, more than any frame's length.
    for i, byte in enumerate(view[at + 1 : at + 6]):
        length |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return at + 2 + i, at + 2 + i + length
    return 0, 0
