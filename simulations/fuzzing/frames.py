"""Cases for the readers of both sides: frames whose bytes or protobuf fields are damaged."""

import random
from typing import Any

from fedsplit.errors import FedsplitError
from fedsplit.transport.envelope import read_frame, write_frame
from fedsplit.transport.frames import FRAME_BYTES, Body, Reader, to_frames
from fedsplit.wire.messages import Request
from simulations.fuzzing import odd
from simulations.fuzzing.case import Case
from simulations.fuzzing.samples import mutated
from simulations.fuzzing.stage import ATTACKERS, Stage

_UNKNOWN = b"\xc2\x0c\x03abc"  # field 200, of 3 bytes


def bytes_case(case: Case, stage: Stage) -> None:
    """Frames of a message, of which some have damaged bytes, are lost, repeated or in disorder."""
    read(case, stage, disordered(case.rng, _frames(case, stage)))


def protobuf_case(case: Case, stage: Stage) -> None:
    """Frames of a message, of which one has odd protobuf fields."""
    frames = _frames(case, stage)
    at = case.rng.randrange(len(frames))
    frames[at] = with_odd_fields(case.rng, frames[at])
    read(case, stage, frames)


def disordered(rng: random.Random, frames: list[bytes]) -> list[bytes]:
    """Return frames of which some are damaged, lost, repeated or in disorder."""
    frames = list(frames)
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(frames))
        match rng.randrange(8):
            case 0 if len(frames) > 1:
                del frames[at]
            case 1:
                frames.insert(at, frames[at])
            case 2:
                frames.append(frames.pop(at))
            case _:
                frames[at] = odd.damaged(rng, frames[at])
    return frames


def with_odd_fields(rng: random.Random, frame: bytes) -> bytes:
    """Return a frame whose header has some odd fields."""
    header, payload = read_frame(frame, FRAME_BYTES)
    for _ in range(rng.choice((1, 1, 2, 4))):
        _change_field(rng, header)
    if rng.random() < 0.1:
        header.MergeFromString(_UNKNOWN)
    if rng.random() < 0.1:
        payload = memoryview(odd.damaged(rng, bytes(payload)))
    return write_frame(header, [payload]) + rng.choice((b"", b"", _UNKNOWN))


def _change_field(rng: random.Random, message: Any) -> None:
    field = rng.choice(message.DESCRIPTOR.fields)
    if field.message_type and field.message_type.GetOptions().map_entry:
        _change_map(rng, field, getattr(message, field.name))
    elif field.label == field.LABEL_REPEATED:
        _change_list(rng, field, getattr(message, field.name))
    elif field.message_type:
        # Of the bodies, mostly the one that is there: setting another one clears it.
        present = [each for each, _ in message.ListFields() if each.message_type]
        if present and rng.random() < 0.9:
            field = next((e for e in present if e.label != e.LABEL_REPEATED), field)
        if rng.random() < 0.1:
            message.ClearField(field.name)
        else:
            getattr(message, field.name).SetInParent()
            if field.message_type.fields:
                _change_field(rng, getattr(message, field.name))
    else:
        setattr(message, field.name, _value(rng, field))


def _change_map(rng: random.Random, field: Any, values: Any) -> None:
    value = field.message_type.fields_by_name["value"]
    for _ in range(rng.choice((1, 3, 200))):
        values[odd.text(rng)] = _value(rng, value)


def _change_list(rng: random.Random, field: Any, values: Any) -> None:
    if rng.random() < 0.3:
        del values[:]
    for _ in range(rng.choice((1, 1, 2, 6, 300))):
        if not field.message_type:
            values.append(_value(rng, field))
        elif values and rng.random() < 0.5:
            values.add().CopyFrom(values[0])
        else:
            _change_field(rng, values.add())


def _value(rng: random.Random, field: Any) -> Any:
    match field.cpp_type:
        case field.CPPTYPE_STRING:
            return odd.damaged(rng, b"abc") if field.type == field.TYPE_BYTES else odd.text(rng)
        case field.CPPTYPE_DOUBLE | field.CPPTYPE_FLOAT:
            return odd.number(rng)
        case field.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case field.CPPTYPE_ENUM:
            return rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 2**31 - 1))
        case field.CPPTYPE_UINT32:
            return odd.integer(rng) % 2**32
        case field.CPPTYPE_UINT64:
            return odd.integer(rng)
    raise TypeError(f"{field.full_name} has a type that the fuzzer does not know")


def _frames(case: Case, stage: Stage) -> list[bytes]:
    rng = case.rng
    client = rng.choice(ATTACKERS)
    samples = stage.samples[client]
    message: Any
    if rng.random() < 0.3:
        message = samples.reply(rng)
    else:
        message = samples.request(rng, stage.session(client, rng.randrange(3)), rng.randrange(4))
    if rng.random() < 0.1:
        message = mutated(message, rng)
    return list(to_frames(message, chunk_bytes=rng.choice((1 << 20, 64, 512))))


def read(case: Case, stage: Stage, frames: list[bytes]) -> None:
    """Read frames as a stream or a call; the trunk gets some of the requests that come out."""
    case.sent(frames)
    rng, reader = case.rng, Reader(stage.max_bytes)
    is_stream = len(frames) > 1 or rng.random() < 0.7
    for frame in frames:
        body: Body | None
        try:
            body = reader.feed(frame) if is_stream else Reader(stage.max_bytes).only(frame)
        except FedsplitError as error:
            case.got(error)
            return
        case.got(body)
        if isinstance(body, Request) and rng.random() < 0.5:
            stage.ask(case, rng.choice(ATTACKERS), body)
