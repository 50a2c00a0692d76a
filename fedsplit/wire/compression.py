"""Lossy codecs for hidden states and their gradients: fewer bytes, row by row.

Shapes: N rows, D values a row (a tensor's last dimension; all others are rows), K values that
are kept of it. A codec is pure: the same tensor has the same bytes, so a request that is sent
again says the same, and what is random is seeded by the tensor itself. A row that holds NaN or
Inf comes back with NaN or Inf in it, for the trunk's guard to see.
"""

import math
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

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


class Codec(ABC):
    """Makes bytes of float32 rows, and rows of bytes."""

    @abstractmethod
    def check(self, nbytes: int, num_rows: int, width: int) -> None:
        """Refuse a number of bytes that so many rows of `width` values cannot take.

        Raises:
            BadTensor: It is refused.
        """

    @abstractmethod
    def encode(self, rows_ND: Tensor, whole_ND: Tensor | None = None) -> Tensor:
        """The bytes, as uint8 of any shape.

        Args:
            rows_ND: What to encode.
            whole_ND: Where those are differences, the rows that they help to say.
        """

    @abstractmethod
    def decode(self, bytes_M: Tensor, num_rows: int, width: int) -> Tensor:
        """The rows of `width` values in float32, out of bytes of a length that was checked.

        Raises:
            BadTensor: They are nothing that `encode` makes.
        """


class RowCodec(Codec):
    """A codec in which every row takes equally many bytes."""

    def check(self, nbytes: int, num_rows: int, width: int) -> None:
        """See `Codec`."""
        row_bytes, rest = divmod(nbytes, num_rows)
        if rest:
            raise BadTensor(f"{nbytes} bytes were announced, which {num_rows} rows cannot share")
        self.check_row(row_bytes, width)

    def decode(self, bytes_M: Tensor, num_rows: int, width: int) -> Tensor:
        """See `Codec`."""
        return self.decode_rows(bytes_M.view(num_rows, -1), width)

    @abstractmethod
    def check_row(self, row_bytes: int, width: int) -> None:
        """Refuse a number of bytes that a row of `width` values cannot take.

        Raises:
            BadTensor: It is refused.
        """

    @abstractmethod
    def decode_rows(self, bytes_NM: Tensor, width: int) -> Tensor:
        """As `decode`, with the bytes of a row in each row."""


@dataclass(frozen=True, slots=True)
class Cast(RowCodec):
    """A narrower float. Values beyond its range become Inf, as everywhere in torch.

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
    """Whole numbers of `bits` bits, and a scale per row: its largest value over the largest number.

    An error is at most half a scale with rounding to nearest. `stochastic` rounding is off by
    less than one, and by nothing on average: Alistarh et al. 2017, "QSGD", arXiv 1610.02132.

    Args:
        bits: Of a number: 8 or 4.
        stochastic: How to round.
    """

    bits: int
    stochastic: bool = False

    @property
    def most(self) -> int:
        """The largest number."""
        return int(2 ** (self.bits - 1)) - 1

    def check_row(self, row_bytes: int, width: int) -> None:
        """See `RowCodec`."""
        _check_length(row_bytes, _SCALE_BYTES + packed_bytes(width, self.bits), width)

    def encode(self, rows_ND: Tensor, whole_ND: Tensor | None = None) -> Tensor:
        """See `Codec`."""
        largest_N1 = largest(rows_ND)
        scales_N1 = rounded_up(largest_N1 / self.most)
        steps_ND = rows_ND / scales_N1.float()
        if self.stochastic:
            steps_ND = steps_ND.add_(noise(rows_ND)).floor_()
        numbers_ND = numbers_of(steps_ND, self.most)
        return torch.cat([scales_N1.view(torch.uint8), pack(numbers_ND, self.bits)], dim=1)

    def decode_rows(self, bytes_NM: Tensor, width: int) -> Tensor:
        """See `RowCodec`."""
        scales = bytes_NM[:, :_SCALE_BYTES].clone(memory_format=torch.contiguous_format)
        scales_N1 = scales.view(torch.bfloat16).float()
        numbers_ND = unpack(bytes_NM[:, _SCALE_BYTES:], self.bits, width)
        return numbers_ND.float().sub_(self.most).mul_(scales_N1)


@dataclass(frozen=True, slots=True)
class TopK(RowCodec):
    """The largest of every row, as whole numbers of 8 bits, and a bit per value for where they are.

    Aji and Heafield 2017, "Sparse Communication for Distributed Gradient Descent", arXiv
    1704.05021. `chance` is how many of the K are drawn from all the others instead, which keeps
    small values from never being sent: Zheng et al. 2023, "Reducing Communication for Split
    Learning by Randomized Top-k Sparsification", arXiv 2305.18469.

    Args:
        fraction: K over D, rounded up; one that is only to decode needs none.
        chance: A fraction of K.
    """

    fraction: float = 1.0
    chance: float = 0.0

    def check_row(self, row_bytes: int, width: int) -> None:
        """See `RowCodec`."""
        kept = _num_kept(row_bytes, width)
        if not 1 <= kept <= width:
            raise BadTensor(f"rows of {row_bytes} bytes hold {kept} of {width} values")

    def encode(self, rows_ND: Tensor, whole_ND: Tensor | None = None) -> Tensor:
        """See `Codec`."""
        kept_NK = self._chosen(rows_ND).sort(dim=1).values
        mask_ND = torch.zeros_like(rows_ND, dtype=torch.uint8).scatter_(1, kept_NK, 1)
        values = _KEPT.encode(rows_ND.gather(1, kept_NK))
        return torch.cat([pack(mask_ND, 1), values], dim=1)

    def decode_rows(self, bytes_NM: Tensor, width: int) -> Tensor:
        """See `RowCodec`."""
        kept = _num_kept(bytes_NM.shape[1], width)
        bytes_of_mask = packed_bytes(width, 1)
        mask_ND = unpack(bytes_NM[:, :bytes_of_mask], 1, width).bool()
        if not mask_ND.sum(dim=1).eq(kept).all():
            raise BadTensor(f"a row says of other than {kept} of its {width} values where they are")
        rows_ND = torch.zeros(mask_ND.shape)
        rows_ND[mask_ND] = _KEPT.decode_rows(bytes_NM[:, bytes_of_mask:], kept).flatten()
        return rows_ND

    def _chosen(self, rows_ND: Tensor) -> Tensor:
        sizes_ND = rows_ND.abs()
        kept = max(1, math.ceil(self.fraction * rows_ND.shape[1]))
        drawn = min(int(self.chance * kept), rows_ND.shape[1] - kept)
        largest_NK = sizes_ND.topk(kept - drawn, dim=1).indices
        if not drawn:
            return largest_NK
        lots_ND = noise(rows_ND).scatter_(1, largest_NK, -1.0)
        return torch.cat([largest_NK, lots_ND.topk(drawn, dim=1).indices], dim=1)


@dataclass(frozen=True, slots=True)
class Huffman(Codec):
    """Whole numbers of dithered steps, of which the frequent ones take fewer bits.

    A step is a part of its row's root mean square: at equal bytes the error is less than with one
    that goes by the largest value. Of a difference it is one of the whole row, so its error is what
    it always is, and it takes fewer bytes. Both ends make the same dither, which is added before
    rounding and taken away after it. So an error is at most half a step, and nothing on average,
    whatever the value: Ziv 1985, "On Universal Quantization", IEEE Transactions on Information
    Theory 31(3).

    The bytes are the dither's seed and a raw deflate stream of Huffman codes alone: the high bytes
    of all steps as bfloat16, the low ones, and a byte for each number; each in blocks of its own.

    Args:
        step: In root mean squares of a row; one that is only to decode needs none.
    """

    step: float = 1.0

    def check(self, nbytes: int, num_rows: int, width: int) -> None:
        """See `Codec`."""
        symbols = num_rows * (_SCALE_BYTES + width)
        if 8 * (nbytes - _SEED_BYTES) < symbols:  # of Huffman codes, none is shorter than a bit
            raise BadTensor(f"{nbytes} bytes are no code of {symbols} symbols; they are too few")

    def encode(self, rows_ND: Tensor, whole_ND: Tensor | None = None) -> Tensor:
        """See `Codec`."""
        seed, steps_N1 = seed_of(rows_ND), self._steps(rows_ND, whole_ND)
        dithered_ND = (rows_ND / steps_N1.float()).add_(dither(rows_ND.shape, seed, rows_ND))
        low_N, high_N = steps_N1.view(torch.uint8).unbind(dim=1)
        packed = bytearray(seed.to_bytes(_SEED_BYTES, "little"))
        deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS, strategy=zlib.Z_HUFFMAN_ONLY)
        for symbols in (high_N, low_N, numbers_of(dithered_ND, _KEPT.most)):
            packed += deflate.compress(symbols.cpu().contiguous().numpy().data)
            packed += deflate.flush(zlib.Z_BLOCK)
        return torch.frombuffer(packed + deflate.flush(), dtype=torch.uint8)

    def decode(self, bytes_M: Tensor, num_rows: int, width: int) -> Tensor:
        """See `Codec`."""
        seed = int.from_bytes(bytes_M[:_SEED_BYTES].numpy(), "little")
        symbols = inflated(bytes_M[_SEED_BYTES:], num_rows * (_SCALE_BYTES + width))
        high_N, low_N, numbers = torch.split(symbols, [num_rows, num_rows, num_rows * width])
        steps_N1 = torch.stack([low_N, high_N], dim=1).view(torch.bfloat16).float()
        rows_ND = numbers.view(num_rows, width).float().sub_(_KEPT.most)
        return rows_ND.sub_(dither(rows_ND.shape, seed, rows_ND)).mul_(steps_N1)

    def _steps(self, rows_ND: Tensor, whole_ND: Tensor | None) -> Tensor:
        """Long enough for the largest value to be a number."""
        largest_N1 = largest(rows_ND)
        if whole_ND is None:
            rms_N1 = rms(rows_ND, largest_N1)
        else:
            rms_N1 = rms(whole_ND, largest(whole_ND))
        return rounded_up(torch.maximum(self.step * rms_N1, largest_N1 / _KEPT.most))


_KEPT = Int(8)

READERS: dict[str, Codec] = {
    "bf16": Cast(torch.bfloat16),
    "fp16": Cast(torch.float16),
    "int8": Int(8),
    "int4": Int(4),
    "topk": TopK(),
    "huffman": Huffman(),
}
"""What decodes a tensor, by the name that its header gives; how it was chosen does not matter."""

NUMBERS = {
    "none": 0,
    "bf16": 1,
    "fp16": 2,
    "int8": 3,
    "int4": 4,
    "topk": 5,
    "huffman": 7,
}
"""How a header names a codec. A number is never used again: 6 was that of a codec now removed."""


def writer(name: str) -> tuple[str, Codec]:
    """The name that goes into a header, and the codec, of one such as `int8:stochastic`.

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


def _check_length(row_bytes: int, expected: int, width: int) -> None:
    if row_bytes != expected:
        raise BadTensor(f"a row of {width} values takes {expected} bytes, not {row_bytes}")


def _num_kept(row_bytes: int, width: int) -> int:
    return row_bytes - _SCALE_BYTES - packed_bytes(width, 1)
