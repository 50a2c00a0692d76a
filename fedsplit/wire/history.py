"""Differences in place of activations: what both sides have had of an example need not cross again.

Wang et al. 2022, "Fine-tuning Language Models over Slow Networks using Activation Quantization with
Guarantees" (AQ-SGD), arXiv 2206.01299. An example's base is what the receiver made of it the last
time, of the smashed data on its way up and of the trunk's output on its way down. What travels is
the difference from it, and what the receiver makes of that is the next base.

Shapes: B sequences, T tokens, D hidden width.

A base has a name that is made of its values, so it cannot be mistaken for another. The client says
which it goes by; a trunk that has lost one says so and is given it again. So what is lost costs
bytes and changes no number.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.wire.codec import as_received

NEW = 0
"""In place of a base's name: there is none yet; keep what comes as the next one."""

UNKEPT = -1
"""In place of a base's name: there is none, and there shall be none."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Base:
    """What the receivers last made of one example, up and down, as bfloat16; and its name."""

    up_TD: Tensor
    down_TD: Tensor
    name: int

    @staticmethod
    def of(up_TD: Tensor, down_TD: Tensor) -> "Base":
        """Of what has arrived."""
        up_TD, down_TD = (each.detach().cpu().bfloat16().clone() for each in (up_TD, down_TD))
        digest = hashlib.blake2b(digest_size=8)
        for each in (up_TD, down_TD):
            digest.update(each.view(torch.uint8).numpy().data)
        return Base(
            up_TD=up_TD, down_TD=down_TD, name=1 + (int.from_bytes(digest.digest(), "little") >> 1)
        )

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return self.up_TD.nbytes + self.down_TD.nbytes


def stacked(bases: Sequence[Base | None], like_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """The bases of a batch's sequences, up and down; zeros where there is none.

    Args:
        bases: One for each sequence.
        like_BTD: Has the shape of each.
    """
    up_BTD, down_BTD = (torch.zeros(like_BTD.shape, dtype=torch.bfloat16) for _ in range(2))
    for up_TD, down_TD, base in zip(up_BTD, down_BTD, bases, strict=True):
        if base is not None:
            up_TD.copy_(base.up_TD)
            down_TD.copy_(base.down_TD)
    return up_BTD, down_BTD


def restored(difference_BTD: Tensor, base_BTD: Tensor) -> Tensor:
    """What a receiver makes of a difference."""
    return base_BTD.to(difference_BTD) + difference_BTD


def sent(tensor_BTD: Tensor, codec: str, base_BTD: Tensor) -> Tensor:
    """What the receiver will make of a tensor that travels as its difference from a base."""
    return restored(as_received(tensor_BTD, codec, base_BTD), base_BTD)
