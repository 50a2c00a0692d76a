"""What was sent for a generation: in order when it is read, and free to reorder until then."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedsplit.client.sent_tokens import SentTokens
from tests.core.generating import scene


class CountsCopies(TorchDispatchMode):
    """Counts the elements of all tensors that are made in this thread, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        leaves = [leaf for leaf in tree_leaves(made) if _is_tensor(leaf)]
        self.elements += sum(leaf.numel() for leaf in leaves if _storage(leaf) not in given)
        return made


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("seed", range(30))
def test_any_sequence_of_changes_gives_what_doing_each_at_once_gives(seed):
    rng = random.Random(seed)
    sent, sequences = SentTokens(), 3
    hidden_BTD, positions_BT = torch.zeros(sequences, 0, 2), torch.zeros(sequences, 0)
    for _ in range(25):
        tokens = hidden_BTD.shape[1]
        change = rng.choice(["append", "select", "crop"] if tokens > 1 else ["append"])
        if change == "append":
            new = torch.rand(sequences, rng.randint(1, 3), 2)
            sent.append(new, new[..., 0])
            hidden_BTD = torch.cat([hidden_BTD, new], dim=1)
            positions_BT = torch.cat([positions_BT, new[..., 0]], dim=1)
        elif change == "select":
            sequences = rng.randint(1, 4)
            rows_B = torch.tensor([rng.randrange(len(hidden_BTD)) for _ in range(sequences)])
            sent.select(rows_B)
            hidden_BTD, positions_BT = hidden_BTD[rows_B], positions_BT[rows_B]
        else:
            kept = rng.randint(1, tokens - 1)
            sent.crop(tokens - kept)
            hidden_BTD, positions_BT = hidden_BTD[:, :kept], positions_BT[:, :kept]
        assert sent.num_sequences == sequences
        pieces_BTD, pieces_BT = zip(*sent.pieces(), strict=True)
        assert torch.equal(torch.cat(pieces_BTD, dim=1), hidden_BTD)
        assert torch.equal(torch.cat(pieces_BT, dim=1), positions_BT)


def test_a_copy_is_changed_independently():
    sent = SentTokens()
    sent.append(torch.arange(6.0).view(2, 3, 1), torch.arange(6).view(2, 3))
    copy = sent.copy()
    sent.select(torch.tensor([1]))
    sent.crop(2)
    ((copied_BTD, _),) = copy.pieces()
    assert torch.equal(copied_BTD, torch.arange(6.0).view(2, 3, 1))


@pytest.mark.parametrize("change", ["beams", "drafts"])
def test_a_token_copies_as_much_after_forty_tokens_as_after_four(change):
    with scene("gpt2") as here, torch.no_grad():
        cache = here.client().remote.new_cache()
        copied = []
        for _ in range(40):
            tokens_BTD = torch.rand(3, 2 if change == "drafts" else 1, 32)
            with CountsCopies() as counts:
                cache.carry(tokens_BTD, None, None)
                if change == "drafts":
                    cache.crop(-1)
                else:
                    cache.reorder_cache(torch.tensor([2, 0, 0]))
            copied.append(counts.elements)
        assert copied[39] == copied[3]
