"""The codec: every tensor comes back as it went, and what cannot be true is refused."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.errors import BadTensor, FedsplitError, ProtocolError, TooLarge
from fedsplit.wire import messages as m
from fedsplit.wire.codec import (
    DTYPES,
    TensorMeta,
    decode_tensor,
    encode_tensor,
    through_codec,
)
from fedsplit.wire.replies import check_reply
from fedsplit.wire.validation import check_request

LIMITS = m.Limits(max_rows=2, max_tokens=4, hidden_size=3, session_tokens=16, stateless_bytes=4096)


def forward(**changes: Any) -> m.ForwardRequest:
    fields = dict(session="s1", call=0, training=True, smashed_BTD=torch.zeros(2, 4, 3))
    return m.ForwardRequest(**(fields | changes))


def backward(grad_trunk_out_BTD: torch.Tensor) -> m.BackwardRequest:
    return m.BackwardRequest(
        session="s1", call=0, want_grad=True, grad_trunk_out_BTD=grad_trunk_out_BTD
    )


def opened(**changes: Any) -> m.OpenRequest:
    fields = dict(protocol=1, client="c0", model="m", config="f", hidden_size=3, round=0)
    return m.OpenRequest(**(fields | {"training": True} | changes))


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of random bytes: NaN, Inf and denormals among them; sometimes strided."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    length = math.prod(shape) * dtype.itemsize
    raw = bytearray(draw(st.binary(min_size=length, max_size=length)))
    flat = torch.frombuffer(raw, dtype=torch.uint8)
    tensor = (flat.ge(128) if dtype is torch.bool else flat.view(dtype)).view(shape)
    return tensor.transpose(0, -1) if draw(st.booleans()) else tensor


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


@given(tensors(), st.integers(0, 3))
def test_a_tensor_comes_back_bit_for_bit(tensor: torch.Tensor, offset: int) -> None:
    meta, raw = encode_tensor(tensor)
    assert len(raw) == meta.nbytes
    back = decode_tensor(meta, bytearray(8 * offset) + bytearray(raw), 8 * offset)
    assert (back.dtype, back.shape, bits(back)) == (tensor.dtype, tensor.shape, bits(tensor))


def test_encoding_a_contiguous_tensor_copies_nothing_and_decoding_neither() -> None:
    tensor = torch.zeros(2, 3)
    meta, raw = encode_tensor(tensor)
    tensor.fill_(1.0)
    buffer = bytearray(raw)
    decoded = decode_tensor(meta, buffer)
    assert decoded.equal(torch.ones(2, 3))
    buffer[:] = bytes(len(buffer))
    assert decoded.equal(torch.zeros(2, 3))


def test_a_byte_that_is_no_bool_becomes_true() -> None:
    meta = TensorMeta(dtype="bool", shape=(3,), nbytes=3)
    decoded = decode_tensor(meta, bytearray([0, 2, 255]))
    assert decoded.logical_xor(torch.tensor([True, False, False])).all()


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes", "codec", "text"),
    [
        pytest.param("complex64", (1,), 8, "none", "'complex64' is not one of", id="dtype"),
        pytest.param("float32", (1,), 4, "zip", "codec 'zip' is not one of: none", id="codec"),
        pytest.param("float32", (), 4, "none", "rank 0 was sent", id="rank 0"),
        pytest.param("float32", (1,) * 5, 4, "none", "rank 5 was sent", id="rank 5"),
        pytest.param("float32", (2, 0), 0, "none", "empty dimension", id="empty"),
        pytest.param("float32", (-2, -2), 16, "none", "empty dimension", id="negative"),
        pytest.param("float32", (2, 2), 8, "none", "takes 16 bytes, but 8", id="short"),
        pytest.param("float32", (1 << 32,) * 2, 0, "none", "but 0 were announced", id="overflow"),
    ],
)
def test_a_description_that_cannot_be_true_is_refused(
    dtype: str, shape: tuple[int, ...], nbytes: int, codec: str, text: str
) -> None:
    meta = TensorMeta(dtype=dtype, shape=shape, nbytes=nbytes, codec=codec)
    with pytest.raises(BadTensor, match=text):
        decode_tensor(meta, bytearray(64))


@pytest.mark.parametrize("offset", [-1, 1, 1 << 70])
def test_a_tensor_outside_of_its_payload_is_refused(offset: int) -> None:
    with pytest.raises(BadTensor, match="lies outside of a payload of 8 bytes"):
        decode_tensor(TensorMeta(dtype="int64", shape=(1,), nbytes=8), bytearray(8), offset)


@pytest.mark.parametrize("tensor", [torch.tensor(1.0), torch.zeros(2, 0), torch.zeros(1).cfloat()])
def test_what_may_not_cross_is_refused_before_it_is_sent(tensor: torch.Tensor) -> None:
    with pytest.raises(BadTensor):
        encode_tensor(tensor)


def test_through_codec_copies_every_tensor_and_nothing_else() -> None:
    leaf = torch.ones(1, 2, 3, requires_grad=True)
    request = forward(smashed_BTD=leaf * 2, attention_mask_BT=torch.ones(1, 2, dtype=torch.long))
    copy = through_codec(request)
    assert not copy.smashed_BTD.requires_grad
    assert copy.smashed_BTD.equal(request.smashed_BTD)
    assert copy.smashed_BTD.data_ptr() != request.smashed_BTD.data_ptr()
    assert (copy.session, copy.call, copy.position_ids_BT) == ("s1", 0, None)
    gradient = torch.ones(2)
    reply = m.GradientsReply(norms={"a": 1.0}, names=("a",), gradients=(gradient,))
    assert through_codec(reply).gradients[0].data_ptr() != gradient.data_ptr()
    assert through_codec(m.StepReply(version=3)) == m.StepReply(version=3)


@pytest.mark.parametrize(
    "request_",
    [
        forward(),
        forward(smashed_BTD=torch.zeros(1, 2, 3).bfloat16()),
        forward(
            attention_mask_BT=torch.ones(2, 4, dtype=torch.bool),
            position_ids_BT=torch.zeros(2, 4, dtype=torch.long),
        ),
        forward(autocast="bfloat16"),
        forward(bases_B=torch.tensor([0, -1])),
        forward(bases_B=torch.tensor([7, 8]), references=(torch.zeros(2, 4, 3).bfloat16(),) * 2),
        backward(torch.full((2, 4, 3), math.nan)),
        opened(),
        m.ServiceInfoRequest(),
    ],
    ids=lambda request: type(request).__name__,
)
def test_what_was_agreed_passes(request_: m.Request[Any]) -> None:
    check_request(request_, LIMITS)


@pytest.mark.parametrize(
    ("request_", "error", "text"),
    [
        (forward(smashed_BTD=torch.zeros(2, 4, 5)), BadTensor, "hidden size is 3"),
        (forward(smashed_BTD=torch.zeros(4, 3)), BadTensor, r"smashed has shape \(4, 3\)"),
        (forward(smashed_BTD=torch.zeros(2, 4, 3).long()), BadTensor, "smashed is int64"),
        (forward(smashed_BTD=torch.zeros(3, 4, 3)), TooLarge, "has 3 sequences .* most 2 of 4"),
        (forward(smashed_BTD=torch.zeros(1, 5, 3)), TooLarge, "of 5 tokens"),
        (forward(attention_mask_BT=torch.ones(2, 4)), BadTensor, "attention_mask is float32"),
        (forward(attention_mask_BT=torch.ones(2).long()), BadTensor, r"of shape \(2,\)"),
        (forward(attention_mask_BT=torch.ones(1, 4).long()), BadTensor, "fit 2 sequences"),
        (forward(attention_mask_BT=torch.ones(2, 3).long()), BadTensor, "of 4 tokens"),
        (forward(attention_mask_BT=torch.ones(2, 5).long()), BadTensor, "session that generates"),
        (forward(training=False, bases_B=torch.tensor([0, 0])), ProtocolError, "does not train"),
        (forward(calls_ago=1), ProtocolError, "calls_ago=1 is before the first call"),
        (forward(autocast="int8"), ProtocolError, "autocast='int8' must be bfloat16 or float16"),
        (forward(references=(torch.zeros(2, 4, 3),)), ProtocolError, "without bases_B"),
        (forward(bases_B=torch.tensor([0])), BadTensor, r"int64 of shape \(1,\)"),
        (forward(bases_B=torch.tensor([0, -2])), BadTensor, "a name, 0 or -1"),
        (forward(bases_B=torch.tensor([0, 0]).int()), BadTensor, "bases_B is int32"),
        (
            forward(bases_B=torch.tensor([7, 8]), references=(torch.zeros(2, 4, 3),) * 2),
            BadTensor,
            r"two tensors of shape .2, 4, 3. in bfloat16",
        ),
        (forward(position_ids_BT=torch.ones(1, 4).long()), BadTensor, "position_ids of shape"),
        (forward(position_ids_BT=torch.ones(2, 4)), BadTensor, "position_ids is float32"),
        (backward(torch.zeros(2, 4, 5)), BadTensor, "grad_trunk_out has shape"),
        (backward(torch.zeros(9, 4, 3)), TooLarge, "grad_trunk_out has 9 sequences"),
        (forward(session="../s"), ProtocolError, r"session='\.\./s' must be 1 to 64"),
        (forward(session=""), ProtocolError, "session='' must be"),
        (forward(session="s1\n"), ProtocolError, "must be 1 to 64"),
        (opened(client="c" * 65), ProtocolError, "client='ccc"),
        (opened(model="a b"), ProtocolError, "model='a b'"),
        (forward(call=-1), ProtocolError, "call=-1 must be at least 0"),
        (
            m.StepRequest(session="s", call=0, step=0, num_tokens=1, client_sq_norm=math.nan),
            ProtocolError,
            "client_sq_norm=nan must be at least 0",
        ),
    ],
)
def test_what_was_not_agreed_is_refused_by_name(
    request_: m.Request[Any], error: type[FedsplitError], text: str
) -> None:
    with pytest.raises(error, match=text):
        check_request(request_, LIMITS)


@pytest.mark.parametrize("answer", [torch.zeros(1, 4, 3), torch.zeros(2, 4, 3).double()])
def test_a_client_refuses_a_reply_that_does_not_fit_its_request(answer: torch.Tensor) -> None:
    check_reply(forward(), m.ForwardReply(trunk_out_BTD=torch.ones(2, 4, 3), version=0))
    with pytest.raises(BadTensor, match="answered trunk_out"):
        check_reply(forward(), m.ForwardReply(trunk_out_BTD=answer, version=0))
    sent = backward(torch.zeros(2, 4, 3))
    unasked = replace(sent, want_grad=False)
    check_reply(unasked, m.BackwardReply(grad_smashed_BTD=None, trunk_sq_norm=0.0))
    with pytest.raises(BadTensor, match="answered grad_smashed"):
        check_reply(sent, m.BackwardReply(grad_smashed_BTD=answer, trunk_sq_norm=0.0))
