"""The codec `lowrank`: its bytes, its error, and what it refuses."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsplit.errors import BadTensor
from fedsplit.wire.codec import TensorMeta, as_received, decode_tensor, encode_tensor
from fedsplit.wire.huffman import encoded


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near_a_subspace(rank: int, rows: int = 512, width: int = 96) -> Tensor:
    return drawn(rows, rank) @ drawn(rank, width, seed=1) + 0.01 * drawn(rows, width, seed=2)


def error(rows: Tensor, codec: str) -> float:
    return float((as_received(rows, codec) - rows).square().mean())


@pytest.mark.parametrize(("rank", "fraction"), [(1, 0.05), (4, 0.15), (16, 0.4)])
def test_few_components_take_few_bytes(rank: int, fraction: float) -> None:
    rows = near_a_subspace(rank)
    few, many = (encode_tensor(rows, f"{codec}:0.2") for codec in ("lowrank", "huffman"))
    assert few[1][0] == rank
    assert few[0].nbytes < fraction * many[0].nbytes
    assert error(rows, "lowrank:0.2") <= 1.5 * error(rows, "huffman:0.2")


@pytest.mark.parametrize("rows", [drawn(64, 40), near_a_subspace(3) + drawn(512, 96)])
def test_rows_of_many_components_are_off_by_a_step(rows: Tensor) -> None:
    step = 2 * 0.2 * rows.square().mean(dim=1).sqrt().median() * (1 + 2**-7)
    assert ((as_received(rows, "lowrank:0.2") - rows).abs() <= 0.5 * step * (1 + 1e-4)).all()
    few, many = (encode_tensor(rows, f"{codec}:0.2")[0] for codec in ("lowrank", "huffman"))
    assert few.nbytes < 1.05 * many.nbytes


def test_a_row_of_large_values_takes_no_precision_from_the_others() -> None:
    rows = near_a_subspace(4)
    before = error(rows, "lowrank:0.2")
    rows[3] = 1000 * drawn(96, seed=3)
    others = torch.arange(len(rows)) != 3
    back = as_received(rows, "lowrank:0.2")
    assert (back - rows)[others].square().mean() < 2 * before
    assert torch.cosine_similarity(back[3], rows[3], dim=0) > 0.999


def test_rows_of_zeros_do_not_shorten_the_step() -> None:
    rows = torch.cat([near_a_subspace(4), torch.zeros(1024, 96)])
    nbytes = encode_tensor(rows, "lowrank:0.2")[0].nbytes
    assert nbytes < 2 * encode_tensor(near_a_subspace(4), "lowrank:0.2")[0].nbytes
    assert as_received(torch.zeros(3, 5), "lowrank:0.2").equal(torch.zeros(3, 5))


def test_a_difference_has_the_step_of_its_whole() -> None:
    base = near_a_subspace(4)
    rows = base + 0.1 * near_a_subspace(2)
    meta, _ = encode_tensor(rows, "lowrank:0.2", base)
    assert meta.nbytes < 0.5 * encode_tensor(rows, "lowrank:0.2")[0].nbytes
    restored = base + as_received(rows, "lowrank:0.2", base)
    assert (restored - rows).square().mean() <= 1.5 * error(rows, "huffman:0.2")


CODED = encode_tensor(near_a_subspace(2, rows=6, width=40), "lowrank:1")
WITH_REST = encode_tensor(drawn(60, 50), "lowrank:0.2")


def low_rank(raw: bytes, coded: tuple[TensorMeta, memoryview] = CODED) -> Tensor:
    return decode_tensor(replace(coded[0], nbytes=len(raw)), bytearray(raw))


def sections(rank: int, basis: bytes, coefficients: bytes, rest: bytes = b"") -> bytes:
    lengths = (len(each).to_bytes(4, "little") for each in (basis, coefficients))
    return bytes([rank]) + b"".join(lengths) + basis + coefficients + rest


def section(num_rows: int, width: int) -> bytes:
    return bytes(encoded(drawn(num_rows, width), torch.ones(num_rows, 1)).numpy())


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        pytest.param(bytes(16), "16 bytes are too few for the components of 6 rows", id="short"),
        pytest.param(bytes(1 << 19), "too many for the components of 6 rows", id="long"),
        pytest.param(bytes(100), "0 components were sent; 1 to 6 are possible", id="no rank"),
        pytest.param(
            sections(7, section(7, 40), section(6, 7)), "7 components", id="more than rows"
        ),
        pytest.param(
            sections(1, section(1, 40), section(6, 1))[:-1], "too few for sections", id="cut"
        ),
        pytest.param(
            sections(2, section(1, 40), section(6, 2)), "exactly 84 symbols", id="another basis"
        ),
        pytest.param(
            sections(1, section(1, 40), section(6, 2)), "exactly 18 symbols", id="another rank"
        ),
        pytest.param(
            sections(1, section(1, 40), section(6, 1), section(5, 40)),
            "exactly 252 symbols",
            id="another rest",
        ),
        pytest.param(sections(1, b"", section(6, 1) * 9), "0 bytes are too few", id="no basis"),
    ],
)
def test_what_no_components_are_is_refused(raw: bytes, text: str) -> None:
    with pytest.raises(BadTensor, match=text):
        low_rank(raw)


def test_a_length_that_cannot_be_takes_no_memory() -> None:
    meta = TensorMeta(dtype="float32", shape=(1 << 30, 1 << 20), nbytes=64, codec="lowrank")
    tracemalloc.start()
    with pytest.raises(BadTensor, match="64 bytes are too few for the components"):
        decode_tensor(meta, bytearray(64))
    assert tracemalloc.get_traced_memory()[1] < 1 << 16
    tracemalloc.stop()


@given(st.booleans(), st.binary(max_size=60), st.floats(0, 1), st.integers(0, 255))
def test_any_bytes_are_a_tensor_or_refused(
    has_rest: bool, tail: bytes, where: float, byte: int
) -> None:
    coded = WITH_REST if has_rest else CODED
    whole = bytes(coded[1])
    place = int(where * (len(whole) - 1))
    changes: list[Callable[[], bytes]] = [
        lambda: whole[: -len(tail) or None] + tail,
        lambda: whole[:place] + bytes([byte]) + whole[place + 1 :],
    ]
    for change in changes:
        try:
            assert low_rank(change(), coded).shape == coded[0].shape
        except BadTensor as refusal:
            assert str(refusal)  # noqa: PT017
