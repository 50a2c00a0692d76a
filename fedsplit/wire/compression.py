"""Lossy codecs that compress hidden states and their gradients row by row.

Shapes: N rows, D values in a row (a tensor's last dimension; all others are rows), of which K are
kept. A codec is pure: the same tensor has the same bytes, so a retry sends the same request. Random
numbers are seeded by the tensor itself. A row with NaN or Inf is decoded to one with NaN or Inf,
so that the trunk's guard can refuse it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.errors import BadTensor
from fedsplit.spec.checks import parsed_codec
from fedsplit.wire.huffman import Huffman
from fedsplit.wire.lossy import Codec, RowCodec
from fedsplit.wire.low_rank import LowRank
from fedsplit.wire.packing import (
    largest,
    noise,
    numbers_of,
    pack,
    packed_bytes,
    rounded_up,
    unpack,
)

_SCALE_BYTES = 2


@dataclass(frozen=True, slots=True)
class Cast(RowCodec):
    """A float of 16 bits. Values beyond its range become Inf, as in any cast of torch.

    bfloat16 has float32's range and 8 bits of precision, float16 11 bits up to 65504.
    """

    dtype: torch.dtype

    def check_row(self, row_bytes: int, width: int) -> None:
        """See `RowCodec`."""
        _check_length(row_bytes, width * self.dtype.itemsize, width)

    def encode(self, rows_ND: Tensor, whole_ND: Tensor | None = None) -> Tensor:
        """See `Codec`."""
        return rows_ND.to(self.dtype).view(torch.uint8)

    def decode_rows(self, bytes_NM: Tensor, width: int) -> Tensor:
        """See `RowCodec`."""
        return bytes_NM.view(self.dtype).float()


@dataclass(frozen=True, slots=True)
class Int(RowCodec):
    """Integers of `bits` bits and a scale per row: its largest value over the largest integer.

    The error is at most half a scale with rounding to nearest. With `stochastic` rounding it is
    less than one scale, and 0 in expectation: Alistarh et al. 2017, "QSGD", arXiv 1610.02132.

    Args:
        bits: Bits of an integer: 8 or 4.
        stochastic: Whether to round at random instead of to nearest.
    """

    bits: int
    stochastic: bool = False

    @property
    def max_number(self) -> int:
        """The largest integer."""
        return int(2 ** (self.bits - 1)) - 1

    def check_row(self, row_bytes: int, width: int) -> None:
        """See `RowCodec`."""
        _check_length(row_bytes, _SCALE_BYTES + packed_bytes(width, self.bits), width)

    def encode(self, rows_ND: Tensor, whole_ND: Tensor | None = None) -> Tensor:
        """See `Codec`."""
        largest_N1 = largest(rows_ND)
        scales_N1 = rounded_up(largest_N1 / self.max_number)
        # Divided by the scale as it is sent, so that the receiver multiplies by the same number.
        steps_ND = rows_ND / scales_N1.float()
        if self.stochastic:
            steps_ND = steps_ND.add_(noise(rows_ND)).floor_()
        numbers_ND = numbers_of(steps_ND, self.max_number)
        return torch.cat([scales_N1.view(torch.uint8), pack(numbers_ND, self.bits)], dim=1)

    def decode_rows(self, bytes_NM: Tensor, width: int) -> Tensor:
        """See `RowCodec`."""
        # A column of a row is strided, and a view as another dtype needs contiguous memory.
        scales = bytes_NM[:, :_SCALE_BYTES].clone(memory_format=torch.contiguous_format)
        scales_N1 = scales.view(torch.bfloat16).float()
        numbers_ND = unpack(bytes_NM[:, _SCALE_BYTES:], self.bits, width)
        return numbers_ND.float().sub_(self.max_number).mul_(scales_N1)


@dataclass(frozen=True, slots=True)
class TopK(RowCodec):
    """The largest values of every row as integers of 8 bits, and a bit mask of their positions.

    Aji and Heafield 2017, "Sparse Communication for Distributed Gradient Descent", arXiv
    1704.05021. `chance` is the fraction of the K that is drawn at random from all other values,
    so that small values are sent sometimes: Zheng et al. 2023, "Reducing Communication for Split
    Learning by Randomized Top-k Sparsification", arXiv 2305.18469.

    Args:
        fraction: K over D, rounded up; decoding does not use it.
        chance: The fraction of K that is drawn at random; decoding does not use it.
    """

    fraction: float = 1.0
    chance: float = 0.0

    def check_row(self, row_bytes: int, width: int) -> None:
        """See `RowCodec`."""
        kept = _num_kept(row_bytes, width)
        if not 1 <= kept <= width:
            raise BadTensor(f"a row of {row_bytes} bytes would hold {kept} of {width} values")

    def encode(self, rows_ND: Tensor, whole_ND: Tensor | None = None) -> Tensor:
        """See `Codec`."""
        # In order of position, which is all that the receiver can read from the mask.
        kept_NK = self._selected(rows_ND).sort(dim=1).values
        mask_ND = torch.zeros_like(rows_ND, dtype=torch.uint8).scatter_(1, kept_NK, 1)
        values = _INT8.encode(rows_ND.gather(1, kept_NK))
        return torch.cat([pack(mask_ND, 1), values], dim=1)

    def decode_rows(self, bytes_NM: Tensor, width: int) -> Tensor:
        """See `RowCodec`."""
        kept = _num_kept(bytes_NM.shape[1], width)
        bytes_of_mask = packed_bytes(width, 1)
        mask_ND = unpack(bytes_NM[:, :bytes_of_mask], 1, width).bool()
        if not mask_ND.sum(dim=1).eq(kept).all():
            raise BadTensor(f"a row's bit mask does not mark {kept} of its {width} values")
        rows_ND = torch.zeros(mask_ND.shape)
        rows_ND[mask_ND] = _INT8.decode_rows(bytes_NM[:, bytes_of_mask:], kept).flatten()
        return rows_ND

    def _selected(self, rows_ND: Tensor) -> Tensor:
        sizes_ND = rows_ND.abs()
        kept = max(1, math.ceil(self.fraction * rows_ND.shape[1]))
        drawn = min(int(self.chance * kept), rows_ND.shape[1] - kept)
        largest_NK = sizes_ND.topk(kept - drawn, dim=1).indices
        if not drawn:
            return largest_NK
        # Values that are kept anyway get a priority below all others.
        priorities_ND = noise(rows_ND).scatter_(1, largest_NK, -1.0)
        return torch.cat([largest_NK, priorities_ND.topk(drawn, dim=1).indices], dim=1)


_INT8 = Int(8)

READERS: dict[str, Codec] = {
    "bf16": Cast(torch.bfloat16),
    "fp16": Cast(torch.float16),
    "int8": Int(8),
    "int4": Int(4),
    "topk": TopK(),
    "huffman": Huffman(),
    "lowrank": LowRank(),
}
"""The codec that decodes a tensor, by the name in its header; encoding options do not matter."""

NUMBERS = {
    "none": 0,
    "bf16": 1,
    "fp16": 2,
    "int8": 3,
    "int4": 4,
    "topk": 5,
    "huffman": 7,
    "lowrank": 8,
}
"""The number of a codec in a header. A number is not reused: 6 was that of a removed codec."""


def writer(name: str) -> tuple[str, Codec]:
    """The name for the header, and the codec, of a setting such as `int8:stochastic`.

    Raises:
        ConfigError: There is no such codec.
    """
    kind, option = parsed_codec("codec", name)
    if kind == "topk":
        return kind, TopK(float(option))
    if kind == "randtopk":
        return "topk", TopK(float(option), chance=0.1)
    if kind == "huffman":
        return kind, Huffman(float(option))
    if kind == "lowrank":
        return kind, LowRank(float(option))
    if kind in ("int8", "int4"):
        return kind, Int(int(kind[-1]), stochastic=bool(option))
    return kind, READERS[kind]


def _check_length(row_bytes: int, expected: int, width: int) -> None:
    if row_bytes != expected:
        raise BadTensor(f"a row of {width} values takes {expected} bytes, not {row_bytes}")


def _num_kept(row_bytes: int, width: int) -> int:
    return row_bytes - _SCALE_BYTES - packed_bytes(width, 1)
