"""Dithered integers in Huffman codes: the codec `huffman`, and the sections of `low_rank`.

Shapes: N rows, D values in a row, M bytes. Symbols are the bytes that deflate gets: two for the
step of each row, and one for each integer.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsplit.errors import BadTensor
from fedsplit.wire.lossy import Codec, rows_at_once
from fedsplit.wire.packing import (
    dither,
    inflated,
    largest,
    numbers_of,
    rms,
    rounded_up,
    seed_of,
)

_STEP_BYTES = 2
_SEED_BYTES = 4
_MAX_NUMBER = 127


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
        symbols = num_symbols(num_rows, width)
        if nbytes < fewest_bytes(num_rows, width):
            raise BadTensor(
                f"{nbytes} bytes are too few for the Huffman codes of {symbols} symbols"
            )
        if nbytes > most_bytes(num_rows, width):
            raise BadTensor(
                f"{nbytes} bytes are too many for the Huffman codes of {symbols} symbols"
            )

    def encode(self, rows_ND: Tensor, whole_ND: Tensor | None = None) -> Tensor:
        """See `Codec`."""
        whole_ND = rows_ND if whole_ND is None else whole_ND
        return encoded(rows_ND, self.step * rms(whole_ND, largest(whole_ND)))

    def pieces(self, bytes_M: Tensor, num_rows: int, width: int) -> Iterator[Tensor]:
        """See `Codec`."""
        seed = int.from_bytes(bytes_M[:_SEED_BYTES].numpy(), "little")
        symbols = inflated(bytes_M[_SEED_BYTES:], num_symbols(num_rows, width))
        high_N, low_N, numbers = np.split(symbols, [num_rows, 2 * num_rows])
        numbers_ND = numbers.reshape(num_rows, width)
        for begin in range(0, num_rows, rows_at_once(width)):
            some = slice(begin, begin + rows_at_once(width))
            steps_N2 = torch.from_numpy(np.stack([low_N[some], high_N[some]], axis=1))
            rows_ND = torch.from_numpy(numbers_ND[some].astype(np.float32)).sub_(_MAX_NUMBER)
            rows_ND.sub_(dither(rows_ND.shape, seed, rows_ND, skip=begin * width))
            yield rows_ND.mul_(steps_N2.view(torch.bfloat16).float())


def encoded(rows_ND: Tensor, steps_N1: Tensor) -> Tensor:
    """The bytes, as uint8, of rows with these steps; `Huffman` decodes them.

    Args:
        rows_ND: The rows to encode.
        steps_N1: The step of every row. A step is longer if its row's largest value needs it.
    """
    seed = seed_of(rows_ND)
    steps_N1 = rounded_up(torch.maximum(steps_N1, largest(rows_ND) / _MAX_NUMBER))
    dithered_ND = (rows_ND / steps_N1.float()).add_(dither(rows_ND.shape, seed, rows_ND))
    low_N, high_N = steps_N1.view(torch.uint8).unbind(dim=1)
    packed = bytearray(seed.to_bytes(_SEED_BYTES, "little"))
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS, strategy=zlib.Z_HUFFMAN_ONLY)
    # Z_BLOCK ends a block, so each kind of symbol gets Huffman codes of its own.
    for symbols in (high_N, low_N, numbers_of(dithered_ND, _MAX_NUMBER)):
        packed += deflate.compress(symbols.cpu().contiguous().numpy().data)
        packed += deflate.flush(zlib.Z_BLOCK)
    return torch.frombuffer(packed + deflate.flush(), dtype=torch.uint8)


def num_symbols(num_rows: int, width: int) -> int:
    """The symbols of `num_rows` rows of `width` values."""
    return num_rows * (_STEP_BYTES + width)


def fewest_bytes(num_rows: int, width: int) -> int:
    """The fewest bytes that such rows take: a Huffman code has at least one bit."""
    return _SEED_BYTES + -(-num_symbols(num_rows, width) // 8)


def most_bytes(num_rows: int, width: int) -> int:
    """The most bytes that such rows take; a few more hurt nobody."""
    symbols = num_symbols(num_rows, width)
    # Deflate stores what it cannot make shorter.
    return symbols + symbols // 8 + (1 << 16)
