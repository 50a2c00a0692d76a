"""The positions that a trunk can compute with."""

from torch import Tensor

from fedsplit.errors import BadTensor
from fedsplit.model.stage import TrunkPart


def num_positions(trunk: TrunkPart) -> int:
    """Return the length of the trunk's tables over positions, or 0 if it has none.

    Families with a table (GPT-J, CodeGen) index it with the positions of a request. Others compute
    with them, and take any.
    """
    length = getattr(trunk.config, "max_position_embeddings", None) or 0
    tables = [buffer.shape for buffer in trunk.buffers() if buffer.dim() > 1]
    return length if any(length in shape for shape in tables) else 0


def require_positions(positions_BT: Tensor | None, past: int, tokens: int, length: int) -> None:
    """Refuse positions outside of the trunk's table; on a GPU they would end its whole process.

    Args:
        positions_BT: The positions of the tokens; None if they count on from `past`.
        past: The number of tokens before these.
        tokens: The number of tokens.
        length: The length of the table, or 0 if there is none.

    Raises:
        BadTensor: A position is not in the table.
    """
    if not length:
        return
    first, last = past, past + tokens - 1
    if positions_BT is not None:
        first, last = int(positions_BT.min()), int(positions_BT.max())
    if first < 0 or last >= length:
        raise BadTensor(
            f"the positions of this request are {first} to {last}, but this model has those from "
            f"0 to {length - 1}; send fewer tokens"
        )
