"""Passes of a trunk for several sessions: their input, and how many tokens each was for."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fedsplit.model import TrunkPart
from fedsplit.trunk.shared_pass import Segment
from tests.core.generating import Scene


@contextmanager
def counted(here: Scene) -> Iterator[list[int]]:
    """The tokens of all sequences in each pass of the trunk, in order."""
    tokens: list[int] = []
    hook = here.trunk.register_forward_hook(
        lambda _, inputs, __: tokens.append(inputs[0].shape[0] * inputs[0].shape[1])
    )
    yield tokens
    hook.remove()


def segments(
    trunk: TrunkPart,
    lengths: Sequence[tuple[int, int]],
    past: Sequence[int],
    caches: Sequence[Any],
    seed: int,
) -> list[Segment]:
    """The next tokens of sessions with these caches."""
    chance = torch.Generator().manual_seed(seed)
    return [
        Segment(
            hidden_BTD=torch.randn(rows, tokens, trunk.config.hidden_size, generator=chance),
            attention_mask_BT=None,
            position_ids_BT=None,
            past=gone,
            cache=cache,
        )
        for (rows, tokens), gone, cache in zip(lengths, past, caches, strict=True)
    ]
