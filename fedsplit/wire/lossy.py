"""The interface of lossy codecs.

Shapes: N rows, D values in a row, M bytes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from fedsplit.errors import BadTensor

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


def rows_at_once(width: int) -> int:
    """The number of rows of `width` values that are decoded at once."""
    return max(1, _VALUES_AT_ONCE // width)
