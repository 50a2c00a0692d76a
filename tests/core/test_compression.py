"""Lossy codecs: how far off they are, that they repeat themselves, and what they refuse."""

import math
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsplit.errors import BadTensor, ConfigError
from fedsplit.spec.checks import CODECS, parsed_codec
from fedsplit.wire import messages as m
from fedsplit.wire.codec import (
    TensorMeta,
    as_received,
    decode_tensor,
    encode_tensor,
    through_codec,
)
from fedsplit.wire.compression import NUMBERS, READERS, writer

INTS = {"int8": 127, "int8:stochastic": 127, "int4": 7, "int4:stochastic": 7}
_LEAST = 1e-40
HUFFMAN = ["huffman:0.2", "huffman:0.9", "huffman:4"]
NAMES = [
    "bf16",
    "fp16",
    *INTS,
    *HUFFMAN,
    "lowrank:0.1",
    "lowrank:1",
    "topk:0.3",
    "randtopk:0.9",
    "topk:1",
]
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-1.0, 1.0, width=32)
SPECIAL = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 3.4e38])


@st.composite
def tensors(draw: st.DrawFn, values: st.SearchStrategy[float] = FLOATS) -> Tensor:
    shape = draw(st.lists(st.integers(1, 4), max_size=2)) + [draw(st.integers(1, 20))]
    size = math.prod(shape)
    tensor = torch.tensor(draw(st.lists(values, min_size=size, max_size=size)))
    return tensor.view(shape).to(draw(st.sampled_from([torch.float32, torch.float64])))


@given(tensors(FLOATS | SPECIAL), st.sampled_from(NAMES), st.integers(0, 2))
def test_shape_and_dtype_come_back_and_a_repetition_is_the_same(
    tensor: Tensor, codec: str, offset: int
) -> None:
    meta, raw = encode_tensor(tensor, codec)
    assert len(raw) == meta.nbytes
    assert bytes(encode_tensor(tensor.clone(), codec)[1]) == bytes(raw)
    back = decode_tensor(meta, bytearray(8 * offset) + bytearray(raw), 8 * offset)
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)


@given(tensors(FLOATS | SPECIAL), st.sampled_from(NAMES))
def test_a_row_that_is_not_finite_stays_so(tensor: Tensor, codec: str) -> None:
    rows, back = tensor.view(-1, tensor.shape[-1]), as_received(tensor, codec)
    ill = ~rows.isfinite().all(dim=1)
    assert not back.view_as(rows)[ill].isfinite().all(dim=1).any()


@given(tensors(), st.sampled_from(sorted(INTS)))
def test_an_integer_is_off_by_a_part_of_the_rows_largest(tensor: Tensor, codec: str) -> None:
    steps = 1.0 if codec.endswith("stochastic") else 0.5
    # The scale is rounded up to bfloat16, by at most one part in 128, or to its least number.
    scale = tensor.abs().amax(dim=-1, keepdim=True).double() / INTS[codec] * (1 + 2**-7) + _LEAST
    error = (tensor.double() - as_received(tensor, codec).double()).abs()
    assert (error <= steps * scale * (1 + 1e-5)).all()


@given(tensors(), st.sampled_from(HUFFMAN))
def test_a_step_is_a_part_of_the_rows_root_mean_square(tensor: Tensor, codec: str) -> None:
    rms = tensor.double().square().mean(dim=-1, keepdim=True).sqrt()
    largest = tensor.double().abs().amax(dim=-1, keepdim=True)
    step = torch.maximum(float(codec.partition(":")[2]) * rms, largest / 127) * (1 + 2**-7)
    error = (tensor.double() - as_received(tensor, codec).double()).abs()
    assert (error <= 0.5 * step * (1 + 1e-4) + 127 * _LEAST).all()


@given(tensors())
def test_a_cast_is_that_of_torch(tensor: Tensor) -> None:
    for codec, dtype in {"bf16": torch.bfloat16, "fp16": torch.float16}.items():
        assert as_received(tensor, codec).equal(tensor.float().to(dtype).to(tensor.dtype))


@given(tensors(), st.floats(0.01, 1.0))
def test_the_largest_of_a_row_are_kept(tensor: Tensor, fraction: float) -> None:
    width = tensor.shape[-1]
    kept = max(1, math.ceil(fraction * width))
    rows = tensor.view(-1, width)
    back = as_received(rows, f"topk:{fraction}")
    scale = rows.abs().amax(dim=1, keepdim=True) / 127 * (1 + 2**-7) + _LEAST
    assert ((back != 0).sum(dim=1) <= kept).all()
    left_out = rows.masked_fill(back != 0, 0).abs().amax(dim=1)
    smallest = rows.abs().topk(kept, dim=1).values[:, -1]
    assert (left_out <= torch.maximum(smallest, 0.51 * scale[:, 0])).all()
    assert ((rows - back).abs()[back != 0] <= 0.51 * scale.expand_as(rows)[back != 0]).all()


@pytest.mark.parametrize("codec", ["int8:stochastic", "int4:stochastic", *HUFFMAN])
def test_random_rounding_is_right_on_average(codec: str) -> None:
    row = torch.randn(32, generator=torch.Generator().manual_seed(0))
    many = 20_000
    back = as_received(row.expand(many, 32), codec)
    scale = row.abs().max() / INTS.get(codec, 127)
    if codec in HUFFMAN:
        scale = float(codec.partition(":")[2]) * row.square().mean().sqrt()
    # A rounding's deviation is at most half a step; six deviations of the mean.
    assert ((back.mean(dim=0) - row).abs() <= 6 * 0.51 * scale / math.sqrt(many)).all()
    assert not torch.equal(back[0], back[1])


def test_a_randomized_choice_reaches_small_values() -> None:
    rows = torch.linspace(1.0, 2.0, 20).expand(400, 20)
    assert (as_received(rows, "topk:0.5")[:, :10] == 0).all()
    drawn = (as_received(rows, "randtopk:0.5")[:, :11] != 0).sum(dim=1)
    assert (drawn == 1).all()  # a tenth of the ten that are kept
    assert (as_received(rows, "randtopk:0.5") != 0).any(dim=0).all()


@pytest.mark.parametrize(
    ("codec", "ratio"),
    [("bf16", 0.5), ("int8", 0.254), ("int4", 0.129), ("topk:0.05", 0.049)],
)
def test_what_a_value_costs(codec: str, ratio: float) -> None:
    tensor = torch.randn(2, 3, 128)
    assert encode_tensor(tensor, codec)[0].nbytes / tensor.nbytes == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize(("step", "bits"), [(0.2, 4.5), (0.5, 3.2), (0.9, 2.45), (4.0, 1.36)])
def test_the_longer_a_step_the_fewer_bits(step: float, bits: float) -> None:
    tensor = torch.randn(4, 128, 128, generator=torch.Generator().manual_seed(0))
    meta, _ = encode_tensor(tensor, f"huffman:{step}")
    assert 8 * meta.nbytes / tensor.numel() == pytest.approx(bits, rel=0.03)


def test_a_large_value_takes_no_precision_from_the_others() -> None:
    rows = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    errors = []
    for largest in (4.0, 20.0):
        rows[:, 0] = largest
        errors.append((as_received(rows, "huffman:0.5") - rows).square().mean())
        ratio = (as_received(rows, "int4") - rows).square().mean() / errors[-1]
    assert ratio > 5


def test_the_same_values_have_another_error_at_another_place() -> None:
    rows = torch.ones(1, 8).expand(50, 8)
    assert as_received(rows, "huffman:1").unique().numel() > 300
    assert not as_received(rows, "huffman:1")[:40].equal(as_received(rows[:40], "huffman:1"))


def test_whole_numbers_are_left_alone() -> None:
    mask_BT = torch.ones(2, 4, dtype=torch.long)
    assert encode_tensor(mask_BT, "int8")[0].codec == "none"
    assert as_received(mask_BT, "topk:0.1").equal(mask_BT)


META = {"dtype": "float32", "shape": (2, 16)}
WRONG = {
    "cast": ("bf16", 62, {}, "a row of 16 values takes 32 bytes, not 31"),
    "int": ("int8", 34, {}, "a row of 16 values takes 18 bytes, not 17"),
    "uneven": ("int4", 21, {}, "21 bytes were announced, which is no multiple of 2 rows"),
    "nothing kept": ("topk", 8, {}, "a row of 4 bytes would hold 0 of 16 values"),
    "too short": ("topk", 2, {}, "hold -3 of 16"),
    "too many kept": ("topk", 42, {}, "hold 17 of 16 values"),
    "integers": ("int8", 36, {"dtype": "int64"}, "codec int8 is for floats, .* int64"),
    "a bomb": ("topk", 64, {"shape": (1 << 30, 1 << 30)}, "64 bytes were announced, which"),
    "too few": ("huffman", 8, {}, "8 bytes are too few for the Huffman codes of 36 symbols"),
    "no seed": ("huffman", 0, {}, "0 bytes are too few for the Huffman codes of 36 symbols"),
    "a bomb of codes": ("huffman", 64, {"shape": (1 << 30, 1 << 30)}, "are too few"),
    "another": (
        "zip",
        64,
        {},
        "'zip' is not one of: none, bf16, fp16, int8, int4, topk, huffman, lowrank",
    ),
}


@pytest.mark.parametrize(("codec", "nbytes", "changes", "text"), WRONG.values(), ids=WRONG)
def test_a_length_that_cannot_be_is_refused(
    codec: str, nbytes: int, changes: dict[str, object], text: str
) -> None:
    meta = TensorMeta(nbytes=nbytes, codec=codec, **(META | changes))  # type: ignore[arg-type]
    with pytest.raises(BadTensor, match=text):
        decode_tensor(meta, bytearray(64))


@given(st.binary(min_size=12, max_size=12), st.sampled_from(["topk", "int8", "int4", "bf16"]))
def test_any_bytes_are_a_tensor_or_refused(raw: bytes, codec: str) -> None:
    width = {"topk": 8, "int8": 4, "int4": 8, "bf16": 3}[codec]
    meta = TensorMeta(dtype="float32", shape=(2, width), nbytes=12, codec=codec)
    try:
        assert decode_tensor(meta, bytearray(raw)).shape == (2, width)
    except BadTensor as refusal:
        assert codec == "topk", refusal  # noqa: PT017
        assert "does not mark 3 of its 8 values" in str(refusal)


CODED = encode_tensor(torch.randn(6, 40, generator=torch.Generator().manual_seed(0)), "huffman:1")


def huffman(raw: bytes, **changes: object) -> Tensor:
    return decode_tensor(replace(CODED[0], nbytes=len(raw), **changes), bytearray(raw))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        pytest.param(lambda raw: raw[:-1], "not the code of exactly 252 symbols", id="cut"),
        pytest.param(lambda raw: raw + b"x", "not the code of exactly 252", id="trailing"),
        pytest.param(lambda raw: raw[:4] + b"\xff" + raw[5:], "no Huffman codes", id="no stream"),
        pytest.param(
            lambda raw: raw[:4] + deflated(251), "not the code of exactly 252", id="short"
        ),
        pytest.param(lambda raw: raw[:4] + deflated(253), "not the code of exactly 252", id="long"),
        pytest.param(
            lambda raw: raw[:4] + deflated(10_000_000, zlib.Z_RLE),
            "not the code of exactly 252",
            id="blown up",
        ),
    ],
)
def test_what_no_code_is_is_refused(changed: Callable[[bytes], bytes], text: str) -> None:
    with pytest.raises(BadTensor, match=text):
        huffman(changed(bytes(CODED[1])))


def deflated(num_symbols: int, strategy: int = zlib.Z_HUFFMAN_ONLY) -> bytes:
    deflate = zlib.compressobj(wbits=-15, strategy=strategy)
    return deflate.compress(bytes(num_symbols)) + deflate.flush()


def test_a_bomb_takes_no_more_memory_than_its_tensor() -> None:
    raw = bytes(CODED[1])[:4] + deflated(1 << 26, zlib.Z_RLE)
    tracemalloc.start()
    with pytest.raises(BadTensor, match="not the code"):
        huffman(raw)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


@given(st.binary(max_size=60), st.integers(0, 60), st.integers(0, 255))
def test_any_codes_are_a_tensor_or_refused(tail: bytes, place: int, byte: int) -> None:
    whole = bytes(CODED[1])
    for raw in (
        whole[: -len(tail) or None] + tail,
        whole[:place] + bytes([byte]) + whole[place + 1 :],
    ):
        try:
            assert huffman(raw).shape == (6, 40)
        except BadTensor as refusal:
            assert "code" in str(refusal)  # noqa: PT017


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zip", "wire.up='zip' is not one of: none, bf16, fp16, int8, int4, topk, randtopk"),
        ("topk", "wire.up=topk must say which fraction"),
        ("topk:0", "above 0 and at most 1, such as topk:0.1"),
        ("randtopk:nan", "such as randtopk:0.1"),
        ("huffman", "wire.up=huffman must say how long a step is in root mean squares"),
        ("huffman:5", "above 0 and at most 4, such as huffman:0.5"),
        ("int8:fast", "has no such option; write int8 or int8:stochastic"),
        ("bf16:stochastic", "has no such option; write bf16"),
        ("none:", "write none"),
    ],
)
def test_a_codec_that_is_none_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed_codec("wire.up", text)


def test_a_message_travels_as_it_says() -> None:
    told = dict(session="s1", call=0, training=True, smashed_BTD=torch.randn(2, 4, 16))
    plain, lossy = m.ForwardRequest(**told), m.ForwardRequest(**told, codec="int4")
    assert through_codec(plain).smashed_BTD.equal(plain.smashed_BTD)
    received = through_codec(lossy)
    assert received.smashed_BTD.equal(as_received(plain.smashed_BTD, "int4"))
    assert (received.codec, received.session) == ("int4", "s1")


EXAMPLES = {"FRACTION": "0.1", "STEP": "0.5"}
WITH_OPTION = [
    f"{name}:{EXAMPLES.get(option, option)}"
    for name, options in CODECS.items()
    for option in options
]
WITHOUT_OPTION = [
    name
    for name, options in CODECS.items()
    if name != "none" and not EXAMPLES.keys() & set(options)
]


def test_every_reader_has_a_number_of_its_own() -> None:
    assert NUMBERS.keys() == {"none", *READERS}
    assert len(set(NUMBERS.values())) == len(NUMBERS)
    assert 6 not in NUMBERS.values(), "an older peer would read another codec"


@pytest.mark.parametrize("codec", [*WITHOUT_OPTION, *WITH_OPTION])
def test_every_codec_of_the_spec_is_written_and_read(codec: str) -> None:
    rows = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    meta, raw = encode_tensor(rows, codec)
    assert meta.codec in READERS
    back = decode_tensor(meta, bytearray(raw))
    assert torch.cosine_similarity(back.flatten(), rows.flatten(), dim=0) > 0.5


@pytest.mark.parametrize("codec", WITH_OPTION)
def test_an_option_of_a_codec_changes_what_it_writes(codec: str) -> None:
    name, compress = writer(codec)
    assert compress != READERS[name]
