"""Helpers of the codecs: packs small integers in bytes, rounds scales, draws seeded noise.

Shapes: N rows, D values in a row, M bytes.
"""

import zlib
from functools import reduce

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedsplit.errors import BadTensor


def packed_bytes(width: int, bits: int) -> int:
    """The bytes of `width` integers of `bits` bits."""
    return -(-width * bits // 8)


def numbers_of(steps_ND: Tensor, max_number: int) -> Tensor:
    """The nearest integers from -max_number to max_number, as bytes counted from 0.

    NaN becomes 0: it is 0 / 0 in a row of zeros, or the row's scale is Inf or NaN. Such a scale is
    sent, and makes the decoded row NaN.
    """
    whole_ND = steps_ND.round_().nan_to_num_(nan=0.0).clamp_(-max_number, max_number)
    return whole_ND.add_(max_number).to(torch.uint8)


def inflated(bytes_M: Tensor, length: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    """The symbols that were deflated to these bytes; allocates memory for `length` of them only."""
    inflate = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    try:
        symbols = inflate.decompress(bytes_M.numpy().data, length)
        # Reads the end of the stream; a byte that comes out here is one too many.
        more = inflate.decompress(inflate.unconsumed_tail, 1)
    except zlib.error as exc:
        raise BadTensor(f"{len(bytes_M)} bytes are no Huffman codes: {exc}") from exc
    if more or inflate.unused_data or not inflate.eof or len(symbols) != length:
        raise BadTensor(f"{len(bytes_M)} bytes are not the code of exactly {length} symbols")
    return np.frombuffer(symbols, dtype=np.uint8)


def largest(rows_ND: Tensor) -> Tensor:
    """The largest absolute value of every row."""
    return rows_ND.abs().amax(dim=1, keepdim=True)


def rms(rows_ND: Tensor, largest_N1: Tensor) -> Tensor:
    """Root mean square of every row, 0 where it is NaN."""
    # Divided by the largest value first, so that the squares do not overflow.
    squares_N1 = (rows_ND / largest_N1).square_().mean(dim=1, keepdim=True)
    return squares_N1.sqrt_().nan_to_num_(nan=0.0).mul_(largest_N1)


def rounded_up(positive: Tensor) -> Tensor:
    """As bfloat16, rounded up: a smaller scale would move the largest value out of range."""
    nearest = positive.bfloat16()
    # The bits of positive floats, read as integers, are in the order of the floats.
    following = (nearest.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(nearest.float() < positive, following, nearest)


def seed_of(rows_ND: Tensor) -> int:
    """The seed of random numbers for these rows; the same whenever they are encoded."""
    return zlib.crc32(rows_ND.contiguous().cpu().view(torch.uint8).numpy().data)


def noise(rows_ND: Tensor) -> Tensor:
    """Numbers in [0, 1) that are the same whenever these rows are encoded."""
    # On the CPU, since generators of other devices give other numbers.
    generator = torch.Generator().manual_seed(seed_of(rows_ND))
    return torch.rand(rows_ND.shape, generator=generator).to(rows_ND.device)


def dither(shape: torch.Size, seed: int, like: Tensor, *, skip: int = 0) -> Tensor:
    """Numbers in (-1/2, 1/2), from raw integers that numpy keeps the same in all its versions.

    Args:
        shape: How many of them.
        seed: The seed of their sequence.
        like: A tensor with the dtype and the device that they get.
        skip: How many numbers of the sequence come before them.
    """
    # Each raw integer has 64 bits, which are four numbers.
    ahead, skip = divmod(skip, 4)
    end = skip + shape.numel()
    raw = np.random.PCG64(seed).advance(ahead).random_raw(-(-end // 4)).view(np.int16)
    numbers = torch.from_numpy(raw)[skip:end].view(shape).to(like)
    return numbers.add_(0.5).div_(1 << 16)


def pack(numbers_ND: Tensor, bits: int) -> Tensor:
    """Several small integers in a byte, the first one in the lowest bits."""
    padded = F.pad(numbers_ND, (0, -numbers_ND.shape[1] % (8 // bits)))
    places = range(8 // bits)
    shifted = [padded[:, place :: 8 // bits] << bits * place for place in places]
    return reduce(torch.bitwise_or, shifted)


def unpack(bytes_NM: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of `pack`, for `width` integers in a row."""
    places = range(0, 8, bits)
    spread = torch.stack([bytes_NM >> place & (1 << bits) - 1 for place in places], dim=2)
    return spread.flatten(1)[:, :width]
