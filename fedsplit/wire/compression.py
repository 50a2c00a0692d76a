"""Lossy codecs that compress hidden states and their gradients row by row.

Shapes: N rows, D values in a row (a tensor's last dimension; all others are rows), of which K are
kept. A codec is pure: the same tensor has the same bytes, so a retry sends the same request. Random
numbers are seeded by the tensor itself. A row with NaN or Inf is decoded to one with NaN or Inf,
so that the trunk's guard can refuse it.
"""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsplit.errors import BadTensor
from fedsplit.spec.checks import parsed_codec
from fedsplit.wire.packing import (
    dither,
    inflated,
    largest,
    noise,
    numbers_of,
    pack,
    packed_bytes,
    rms,
    rounded_up,
    seed_of,
    unpack,
)

_SCALE_BYTES = 2
_SEED_BYTES = 4
_VALUES_AT_ONCE = 1 << 18

MAX_WIDTH = 1 << 20
"""The longest row that a peer may send; rows are decoded whole."""


class Codec(ABC):
    """Encodes float32 rows as bytes, and decodes them."""

    @abstractmethod
    def check(self, nbytes: int, num_rows: int, width: int) -> None:
        """Check the number of bytes that `num_rows` rows of `width` values take.

        Raises:
            BadTensor: No encoding of such rows has `nbytes` bytes.
        """

    @abstractmethod
    def encode(self, rows_ND: Tensor, whole_ND: Tensor | None = None) -> Tensor:
        """The bytes, as uint8 of any shape.

        Args:
            rows_ND: The rows to encode, or differences.
            whole_ND: The rows themselves, if `rows_ND` are their differences from a base.
        """

    def decode(
        self, bytes_M: Tensor, num_rows: int, width: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The rows of `width` values; `check` has accepted the number of bytes.

        Raises:
            BadTensor: The bytes are no output of `encode`.
        """
        rows_ND, end = torch.empty(num_rows, width, dtype=dtype), 0
        # In pieces, since a codec's intermediate values take several times the memory of the rows.
        for piece_ND in self.pieces(bytes_M, num_rows, width):
            begin, end = end, end + len(piece_ND)
            rows_ND[begin:end] = piece_ND
        return rows_ND

    @abstractmethod
    def pieces(self, bytes_M: Tensor, num_rows: int, width: int) -> Iterator[Tensor]:
        """The rows in float32, `rows_at_once(width)` at a time; see `decode`."""


class RowCodec(Codec):
    """A codec whose rows all take the same number of bytes."""

    def check(self, nbytes: int, num_rows: int, width: int) -> None:
        """See `Codec`."""
        row_bytes, rest = divmod(nbytes, num_rows)
        if rest:
            raise BadTensor(
                f"{nbytes} bytes were announced, which is no multiple of {num_rows} rows"
            )
        self.check_row(row_bytes, width)

    def pieces(self, bytes_M: Tensor, num_rows: int, width: int) -> Iterator[Tensor]:
        """See `Codec`."""
        for bytes_NM in bytes_M.view(num_rows, -1).split(rows_at_once(width)):
            yield self.decode_rows(bytes_NM, width)

    @abstractmethod
    def check_row(self, row_bytes: int, width: int) -> None:
        """Check the number of bytes that a row of `width` values takes.

        Raises:
            BadTensor: No encoding of such a row has `row_bytes` bytes.
        """

    @abstractmethod
    def decode_rows(self, bytes_NM: Tensor, width: int) -> Tensor:
        """Some of the rows in float32, with one row of bytes for each row of values."""


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


@dataclass(frozen=True, slots=True)
class Huffman(Codec):
    """Integers from dithered quantization, Huffman-coded: frequent integers take fewer bits.

    The quantization step is a fraction of the row's root mean square; at equal bytes, the error is
    smaller than with a fraction of the largest value. For a difference the step is that of the
    whole row, so the error is the same and the bytes are fewer. Both sides generate the same
    dither; it is added before rounding and subtracted after it. So the error is at most half a
    step, and 0 in expectation for every value: Ziv 1985, "On Universal Quantization", IEEE
    Transactions on Information Theory 31(3).

    The bytes are the dither's seed and a raw deflate stream with Huffman codes only: the high bytes
    of all steps as bfloat16, the low bytes, and a byte for each integer; each in separate blocks.

    Args:
        step: The step in root mean squares of a row; decoding does not use it.
    """

    step: float = 1.0

    def check(self, nbytes: int, num_rows: int, width: int) -> None:
        """See `Codec`."""
        symbols = num_rows * (_SCALE_BYTES + width)
        if 8 * (nbytes - _SEED_BYTES) < symbols:  # a Huffman code has at least one bit
            raise BadTensor(
                f"{nbytes} bytes are too few for the Huffman codes of {symbols} symbols"
            )
        # Deflate stores what it cannot make shorter; a few bytes more hurt nobody.
        if nbytes > symbols + symbols // 8 + (1 << 16):
            raise BadTensor(
                f"{nbytes} bytes are too many for the Huffman codes of {symbols} symbols"
            )

    def encode(self, rows_ND: Tensor, whole_ND: Tensor | None = None) -> Tensor:
        """See `Codec`."""
        seed, steps_N1 = seed_of(rows_ND), self._steps(rows_ND, whole_ND)
        dithered_ND = (rows_ND / steps_N1.float()).add_(dither(rows_ND.shape, seed, rows_ND))
        low_N, high_N = steps_N1.view(torch.uint8).unbind(dim=1)
        packed = bytearray(seed.to_bytes(_SEED_BYTES, "little"))
        deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS, strategy=zlib.Z_HUFFMAN_ONLY)
        # Z_BLOCK ends a block, so each kind of symbol gets Huffman codes of its own.
        for symbols in (high_N, low_N, numbers_of(dithered_ND, _INT8.max_number)):
            packed += deflate.compress(symbols.cpu().contiguous().numpy().data)
            packed += deflate.flush(zlib.Z_BLOCK)
        return torch.frombuffer(packed + deflate.flush(), dtype=torch.uint8)

    def pieces(self, bytes_M: Tensor, num_rows: int, width: int) -> Iterator[Tensor]:
        """See `Codec`."""
        seed = int.from_bytes(bytes_M[:_SEED_BYTES].numpy(), "little")
        symbols = inflated(bytes_M[_SEED_BYTES:], num_rows * (_SCALE_BYTES + width))
        high_N, low_N, numbers = np.split(symbols, [num_rows, 2 * num_rows])
        numbers_ND = numbers.reshape(num_rows, width)
        for begin in range(0, num_rows, rows_at_once(width)):
            some = slice(begin, begin + rows_at_once(width))
            steps_N2 = torch.from_numpy(np.stack([low_N[some], high_N[some]], axis=1))
            rows_ND = torch.from_numpy(numbers_ND[some].astype(np.float32)).sub_(_INT8.max_number)
            rows_ND.sub_(dither(rows_ND.shape, seed, rows_ND, skip=begin * width))
            yield rows_ND.mul_(steps_N2.view(torch.bfloat16).float())

    def _steps(self, rows_ND: Tensor, whole_ND: Tensor | None) -> Tensor:
        """The step of every row, large enough for its largest value to be an integer in range."""
        largest_N1 = largest(rows_ND)
        if whole_ND is None:
            rms_N1 = rms(rows_ND, largest_N1)
        else:
            rms_N1 = rms(whole_ND, largest(whole_ND))
        return rounded_up(torch.maximum(self.step * rms_N1, largest_N1 / _INT8.max_number))


_INT8 = Int(8)

READERS: dict[str, Codec] = {
    "bf16": Cast(torch.bfloat16),
    "fp16": Cast(torch.float16),
    "int8": Int(8),
    "int4": Int(4),
    "topk": TopK(),
    "huffman": Huffman(),
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
    if kind in ("int8", "int4"):
        return kind, Int(int(kind[-1]), stochastic=bool(option))
    return kind, READERS[kind]


def rows_at_once(width: int) -> int:
    """The number of rows of `width` values that are decoded at once."""
    return max(1, _VALUES_AT_ONCE // width)


def _check_length(row_bytes: int, expected: int, width: int) -> None:
    if row_bytes != expected:
        raise BadTensor(f"a row of {width} values takes {expected} bytes, not {row_bytes}")


def _num_kept(row_bytes: int, width: int) -> int:
    return row_bytes - _SCALE_BYTES - packed_bytes(width, 1)
