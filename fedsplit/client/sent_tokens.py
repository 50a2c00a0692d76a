"""The hidden states that a client has sent for a generation, in the order of its sequences.

Shapes: B sequences, T tokens, D hidden width.
"""

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """The tokens of one request; `order_B` numbers the sequences that were selected after it."""

    hidden_BTD: Tensor
    positions_BT: Tensor
    order_B: Tensor | None = None


class SentTokens:
    """Hidden states and position ids by request; sequences are reordered only when read.

    Beam search selects sequences at every token. A selection only updates row numbers, so its cost
    does not depend on the number of tokens that were sent before.
    """

    def __init__(self) -> None:
        self._pieces: list[_Piece] = []

    @property
    def num_sequences(self) -> int:
        """B, after all selections."""
        last = self._pieces[-1]
        return len(last.hidden_BTD if last.order_B is None else last.order_B)

    @property
    def num_bytes(self) -> int:
        """The bytes of all hidden states."""
        return sum(piece.hidden_BTD.nbytes for piece in self._pieces)

    def append(self, hidden_BTD: Tensor, positions_BT: Tensor) -> None:
        """Add the tokens of a request; the tensors must not change afterwards."""
        self._pieces.append(_Piece(hidden_BTD=hidden_BTD, positions_BT=positions_BT))

    def select(self, rows_B: Tensor) -> None:
        """Replace the sequences by those with these row numbers; a number may occur repeatedly."""
        last = self._pieces[-1]
        order_B = rows_B if last.order_B is None else last.order_B[rows_B]
        self._pieces[-1] = replace(last, order_B=order_B)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove this many of the last tokens; at least one must stay."""
        while tokens_to_remove:
            last = self._pieces.pop()
            kept = last.hidden_BTD.shape[1] - tokens_to_remove
            if kept > 0:
                # A clone, because a view would keep the memory of the tokens that are removed.
                hidden_BTD = last.hidden_BTD[:, :kept].clone()
                positions_BT = last.positions_BT[:, :kept]
                self._pieces.append(replace(last, hidden_BTD=hidden_BTD, positions_BT=positions_BT))
                return
            tokens_to_remove = -kept
            # The removed piece's selection also applies to the pieces before it.
            if last.order_B is not None:
                self.select(last.order_B)

    def clear(self) -> None:
        """Remove all tokens."""
        self._pieces = []

    def copy(self) -> "SentTokens":
        """A copy that can change independently; the tensors are shared."""
        copy = SentTokens()
        copy._pieces = list(self._pieces)
        return copy

    def pieces(self) -> list[tuple[Tensor, Tensor]]:
        """The hidden states [B, T, D] and position ids [B, T] of each request, in order."""
        pieces = []
        order_B: Tensor | None = None
        # Backwards, because a selection applies to all tokens that were sent before it.
        for piece in reversed(self._pieces):
            if piece.order_B is not None:
                order_B = piece.order_B if order_B is None else piece.order_B[order_B]
            own = piece.hidden_BTD, piece.positions_BT
            pieces.append(own if order_B is None else (own[0][order_B], own[1][order_B]))
        return pieces[::-1]
