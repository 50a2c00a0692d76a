"""Frames: valid protobuf for anybody, and every message comes back, however it is cut."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError, StaleVersion
from fedsplit.transport import fedsplit_pb2 as pb
from fedsplit.transport.frames import Body, Reader, to_frame, to_frames
from fedsplit.wire import messages as m
from tests.edge.echo import LIMITS

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
counts = st.integers(0, 2**63)
names = st.text(max_size=20)


@st.composite
def forwards(draw: st.DrawFn) -> m.ForwardRequest:
    B, T, D = (draw(st.integers(1, 7)) for _ in range(3))
    mask_BT = torch.rand(B, T) > 0.5
    return m.ForwardRequest(
        session=draw(names),
        call=draw(counts),
        training=draw(st.booleans()),
        smashed_BTD=torch.randn(B, T, D).to(draw(st.sampled_from(DTYPES))),
        attention_mask_BT=draw(st.sampled_from([None, mask_BT, mask_BT.int()])),
        position_ids_BT=draw(st.sampled_from([None, torch.arange(B * T).view(B, T)])),
    )


gradients = st.builds(
    m.GradientsReply,
    norms=st.dictionaries(names, st.floats(allow_nan=False)),
    names=st.lists(names).map(tuple),
    gradients=st.lists(st.integers(1, 9).map(torch.randn), max_size=4).map(tuple),
)
backwards = st.builds(
    m.BackwardReply,
    grad_smashed_BTD=st.one_of(st.none(), st.integers(1, 9).map(torch.randn)),
    trunk_sq_norm=st.floats(allow_nan=False),
)
opens = st.builds(
    m.OpenReply, session=names, server_instance_id=names, version=counts, limits=st.just(LIMITS)
)


def assert_equal(one: Any, two: Any) -> None:
    """Equality of messages that looks into their tensors."""
    assert type(one) is type(two)
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
        for x, y in pairs:
            if isinstance(x, torch.Tensor):
                assert x.dtype == y.dtype
                assert x.equal(y)
            else:
                assert x == y


@given(forwards() | gradients | backwards | opens, st.integers(20, 300))
def test_every_message_comes_back_from_frames_of_any_size(message: Body, chunk: int) -> None:
    reader = Reader(1 << 20)
    *before, last = [reader.feed(frame) for frame in to_frames(message, chunk)]
    assert before == [None] * len(before)
    assert_equal(last, message)
    assert_equal(Reader(1 << 20).only(to_frame(message)), message)


@given(forwards() | gradients | backwards | opens)
def test_a_frame_is_valid_protobuf(message: Body) -> None:
    frame = to_frame(message)
    parsed = pb.Frame.FromString(frame)
    assert parsed.header.payload_bytes == len(parsed.payload)
    again = parsed.SerializeToString()
    assert len(again) == len(frame)
    assert_equal(Reader(1 << 20).only(again), message)


def test_a_frame_may_have_its_fields_in_another_order() -> None:
    message = m.BackwardReply(grad_smashed_BTD=torch.randn(3), trunk_sq_norm=0.5)
    parsed = pb.Frame.FromString(to_frame(message))
    payload = pb.Frame(payload=parsed.payload).SerializeToString()
    header = pb.Frame(header=parsed.header).SerializeToString()
    for frame in (payload + header, header + b"\x12\x00" + payload, header + payload + b"\x18\x01"):
        assert_equal(Reader(1 << 20).only(frame), message)


@pytest.mark.parametrize("size", [8, 120, 128, 16376, 16384, 3 << 20])
def test_lengths_of_any_number_of_digits(size: int) -> None:
    message = m.BackwardReply(grad_smashed_BTD=torch.ones(size // 4), trunk_sq_norm=0.5)
    frame = to_frame(message)
    assert pb.Frame.FromString(frame).payload == b"\x00\x00\x80\x3f" * (size // 4)
    assert_equal(Reader(4 << 20).only(frame), message)


def test_tensors_begin_at_multiples_of_eight_bytes() -> None:
    parts = (torch.ones(3, dtype=torch.bool), torch.ones(1, dtype=torch.int64))
    message = m.GradientsReply(norms={}, names=(), gradients=parts)
    assert pb.Frame.FromString(to_frame(message)).payload == b"\1\1\1" + bytes(5) + b"\1" + bytes(7)


def test_received_tensors_can_be_written_to() -> None:
    message = m.BackwardReply(grad_smashed_BTD=torch.zeros(3), trunk_sq_norm=0.5)
    received: Any = Reader(1 << 20).only(to_frame(message))
    received.grad_smashed_BTD.add_(1.0)
    assert_equal(received, replace(message, grad_smashed_BTD=torch.ones(3)))


def test_an_error_is_a_frame_too() -> None:
    error: Any = Reader(0).only(to_frame(StaleVersion("moved on", retry_after_s=0.25)))
    assert isinstance(error, FedsplitError)
    assert (type(error), str(error), error.retry_after_s) == (StaleVersion, "moved on", 0.25)
