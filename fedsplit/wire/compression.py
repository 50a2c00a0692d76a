"""Lossy codecs for hidden states and their gradients: fewer bytes, row by row.

Shapes: N rows, D values a row (a tensor's last dimension; all others are rows), K values that
are kept of it. A codec is pure: the same tensor has the same bytes, so a request that is sent
again says the same, and what is random is seeded by the tensor itself. A row that holds NaN or
Inf comes back with NaN or Inf in it, for the trunk's guard to see.
"""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsplit.errors import BadTensor
from fedsplit.spec.checks import parsed_codec

_SCALE_BYTES = 2


class Codec(ABC):
    """Makes bytes of float32 rows and rows of bytes; every row takes equally many."""

    @abstractmethod
    def check(self, row_bytes: int, width: int) -> None:
        """Refuse a number of bytes that rows of `width` values cannot take.

        Raises:
            BadTensor: It is refused.
        """

    @abstractmethod
    def encode(self, rows_ND: Tensor) -> Tensor:
        """The bytes, as a uint8 matrix of a row for each row."""

    @abstractmethod
    def decode(self, bytes_NM: Tensor, width: int) -> Tensor:
        """The rows of `width` values in float32, out of bytes of a length that was checked.

        Raises:
            BadTensor: They are nothing that `encode` makes.
        """


@dataclass(frozen=True, slots=True)
class Cast(Codec):
    """A narrower float. Values beyond its range become Inf, as everywhere in torch.

    bfloat16 has float32's range and 8 bits of precision, float16 11 bits up to 65504.
    """

    dtype: torch.dtype

    def check(self, row_bytes: int, width: int) -> None:
        """See `Codec`."""
        _check_length(row_bytes, width * self.dtype.itemsize, width)

    def encode(self, rows_ND: Tensor) -> Tensor:
        """See `Codec`."""
        return rows_ND.to(self.dtype).view(torch.uint8)

    def decode(self, bytes_NM: Tensor, width: int) -> Tensor:
        """See `Codec`."""
        return bytes_NM.view(self.dtype).float()


@dataclass(frozen=True, slots=True)
class Int(Codec):
    """Whole numbers of `bits` bits, and a scale per row: its largest value over the largest number.

    An error is at most half a scale with rounding to nearest. `stochastic` rounding is off by
    less than one, and by nothing on average: Alistarh et al. 2017, "QSGD", arXiv 1610.02132.

    Args:
        bits: Of a number: 8, 4 or 3.
        stochastic: How to round.
        reach: How much of the row's largest value the largest number stands for. With few
            bits the others gain more by a finer scale than the largest loses by being cut off.
    """

    bits: int
    stochastic: bool = False
    reach: float = 1.0

    @property
    def most(self) -> int:
        """The largest number."""
        return int(2 ** (self.bits - 1)) - 1

    def check(self, row_bytes: int, width: int) -> None:
        """See `Codec`."""
        _check_length(row_bytes, _SCALE_BYTES + _packed_bytes(width, self.bits), width)

    def encode(self, rows_ND: Tensor) -> Tensor:
        """See `Codec`."""
        largest_N1 = rows_ND.abs().amax(dim=1, keepdim=True)
        scales_N1 = _rounded_up(largest_N1 * (self.reach / self.most))
        steps_ND = rows_ND / scales_N1.float()
        if self.stochastic:
            steps_ND = steps_ND.add_(_noise(rows_ND)).floor_()
        else:
            steps_ND = steps_ND.round_()
        # 0 / 0 of a row of zeros, and all of a row whose scale is Inf or NaN, becomes 0.
        steps_ND = steps_ND.nan_to_num_(nan=0.0).clamp_(-self.most, self.most)
        numbers_ND = steps_ND.add_(self.most).to(torch.uint8)
        return torch.cat([scales_N1.view(torch.uint8), _pack(numbers_ND, self.bits)], dim=1)

    def decode(self, bytes_NM: Tensor, width: int) -> Tensor:
        """See `Codec`."""
        scales = bytes_NM[:, :_SCALE_BYTES].clone(memory_format=torch.contiguous_format)
        scales_N1 = scales.view(torch.bfloat16).float()
        numbers_ND = _unpack(bytes_NM[:, _SCALE_BYTES:], self.bits, width)
        return numbers_ND.float().sub_(self.most).mul_(scales_N1)


@dataclass(frozen=True, slots=True)
class TopK(Codec):
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

    def check(self, row_bytes: int, width: int) -> None:
        """See `Codec`."""
        kept = _num_kept(row_bytes, width)
        if not 1 <= kept <= width:
            raise BadTensor(f"rows of {row_bytes} bytes hold {kept} of {width} values")

    def encode(self, rows_ND: Tensor) -> Tensor:
        """See `Codec`."""
        kept_NK = self._chosen(rows_ND).sort(dim=1).values
        mask_ND = torch.zeros_like(rows_ND, dtype=torch.uint8).scatter_(1, kept_NK, 1)
        values = _KEPT.encode(rows_ND.gather(1, kept_NK))
        return torch.cat([_pack(mask_ND, 1), values], dim=1)

    def decode(self, bytes_NM: Tensor, width: int) -> Tensor:
        """See `Codec`."""
        kept = _num_kept(bytes_NM.shape[1], width)
        bytes_of_mask = _packed_bytes(width, 1)
        mask_ND = _unpack(bytes_NM[:, :bytes_of_mask], 1, width).bool()
        if not mask_ND.sum(dim=1).eq(kept).all():
            raise BadTensor(f"a row says of other than {kept} of its {width} values where they are")
        rows_ND = torch.zeros(mask_ND.shape)
        rows_ND[mask_ND] = _KEPT.decode(bytes_NM[:, bytes_of_mask:], kept).flatten()
        return rows_ND

    def _chosen(self, rows_ND: Tensor) -> Tensor:
        sizes_ND = rows_ND.abs()
        kept = max(1, math.ceil(self.fraction * rows_ND.shape[1]))
        drawn = min(int(self.chance * kept), rows_ND.shape[1] - kept)
        largest_NK = sizes_ND.topk(kept - drawn, dim=1).indices
        if not drawn:
            return largest_NK
        lots_ND = _noise(rows_ND).scatter_(1, largest_NK, -1.0)
        return torch.cat([largest_NK, lots_ND.topk(drawn, dim=1).indices], dim=1)


_KEPT = Int(8)

READERS: dict[str, Codec] = {
    "bf16": Cast(torch.bfloat16),
    "fp16": Cast(torch.float16),
    "int8": Int(8),
    "int4": Int(4),
    "int3": Int(3, reach=0.75),
    "topk": TopK(),
}
"""What decodes a tensor, by the name that its header gives; how it was chosen does not matter."""


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
    if option:
        return kind, Int(int(kind[-1]), stochastic=True)
    return kind, READERS[kind]


# --- bits and bytes ------------------------------------------------------------------------------


def _check_length(row_bytes: int, expected: int, width: int) -> None:
    if row_bytes != expected:
        raise BadTensor(f"a row of {width} values takes {expected} bytes, not {row_bytes}")


def _num_kept(row_bytes: int, width: int) -> int:
    return row_bytes - _SCALE_BYTES - _packed_bytes(width, 1)


def _packed_bytes(width: int, bits: int) -> int:
    return sum(-(-width * piece // 8) for piece in _pieces(bits))


def _rounded_up(positive: Tensor) -> Tensor:
    """As bfloat16, and never smaller: so no number is beyond the largest that its scale allows."""
    nearest = positive.bfloat16()
    following = (nearest.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(nearest.float() < positive, following, nearest)


def _noise(rows_ND: Tensor) -> Tensor:
    """Numbers in [0, 1) that are the same whenever these rows are encoded."""
    content = rows_ND.contiguous().cpu().view(torch.uint8).numpy().data
    generator = torch.Generator().manual_seed(zlib.crc32(content))
    return torch.rand(rows_ND.shape, generator=generator).to(rows_ND.device)


def _pieces(bits: int) -> tuple[int, ...]:
    """Bits of a number that share a byte with as many of its neighbors, lowest first."""
    return (bits,) if 8 % bits == 0 else (2, bits - 2)


def _pack(numbers_ND: Tensor, bits: int) -> Tensor:
    """Several small numbers to a byte, the first one lowest; all low pieces, then the high ones."""
    packed, done = [], 0
    for piece in _pieces(bits):
        pieces_ND = numbers_ND >> done & (1 << piece) - 1
        padded = F.pad(pieces_ND, (0, -numbers_ND.shape[1] % (8 // piece)))
        places = range(8 // piece)
        shifted = [padded[:, place :: 8 // piece] << piece * place for place in places]
        packed.append(reduce(torch.bitwise_or, shifted))
        done += piece
    return torch.cat(packed, dim=1)


def _unpack(bytes_NM: Tensor, bits: int, width: int) -> Tensor:
    numbers_ND = torch.zeros((len(bytes_NM), width), dtype=torch.uint8)
    done = 0
    for piece, part in zip(_pieces(bits), _parted(bytes_NM, bits, width), strict=True):
        places = range(0, 8, piece)
        spread = torch.stack([part >> place & (1 << piece) - 1 for place in places], dim=2)
        numbers_ND |= spread.flatten(1)[:, :width] << done
        done += piece
    return numbers_ND


def _parted(bytes_NM: Tensor, bits: int, width: int) -> Sequence[Tensor]:
    lengths = [-(-width * piece // 8) for piece in _pieces(bits)]
    return torch.split(bytes_NM, lengths, dim=1)
