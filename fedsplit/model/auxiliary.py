"""The auxiliary head: what a bottom trains on by itself when no gradient comes down to it.

Belilovsky, Eickenberg and Oyallon 2020, "Decoupled Greedy Learning of CNNs", arXiv 1901.08164;
for split learning Han, Bhatti, Lee and Moon 2021, "Accelerating Federated Learning with Split
Learning on Locally Generated Losses".

Shapes: B sequences, T tokens, D hidden width, C classes (of a language model its vocabulary).
"""

import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedsplit.data.tasks import TASKS
from fedsplit.errors import ConfigError
from fedsplit.model.stage import AUXILIARY, ClientPart
from fedsplit.randomness import rng_scope

_STD = 0.02


class AuxiliaryHead(nn.Module):
    """Predicts from the hidden states at the cut what the model predicts at its end.

    Args:
        hidden_size: D.
        num_classes: C.
        pools: Whether all tokens of a sequence make one prediction together.
    """

    def __init__(self, hidden_size: int, num_classes: int, *, pools: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.head = nn.Linear(hidden_size, num_classes)
        nn.init.normal_(self.head.weight, std=_STD)
        nn.init.zeros_(self.head.bias)
        self._pools = pools
        # By thread: several may run one client, and what one of them leaves goes with it.
        self._smashed_BTD: WeakKeyDictionary[threading.Thread, Tensor] = WeakKeyDictionary()

    def note(self, _: nn.Module, sent: tuple[Any, ...]) -> None:
        """As a hook before the `Remote` layer: keep what is sent off, with its graph."""
        self._smashed_BTD.pop(threading.current_thread(), None)
        if torch.is_grad_enabled():
            self._smashed_BTD[threading.current_thread()] = sent[0]

    def forward(self, attention_mask_BT: Tensor | None = None) -> Tensor:
        """Logits of what was sent off last; each is there once.

        They are [B, T, C], or [B, C] of the mean over the tokens that are no padding.

        Raises:
            ConfigError: The client has run no forward with gradients since.
        """
        hidden_BTD = self._smashed_BTD.pop(threading.current_thread(), None)
        if hidden_BTD is None:
            raise ConfigError(
                "the auxiliary head has nothing to predict from; run the client's forward first, "
                "with gradients enabled"
            )
        normed_BTD = self.norm(hidden_BTD)
        if self._pools:
            normed_BTD = _mean(normed_BTD, attention_mask_BT)
        logits: Tensor = self.head(normed_BTD)
        return logits


def add_auxiliary_head(client: ClientPart, task: str, seed: int) -> None:
    """Give the bottom a head of its own, a trained submodule named `auxiliary`.

    It is no part of the model: `join_model` and checkpoints leave it out. Add it after adapters,
    which freeze all that is there. The random state of the caller is left alone.

    Args:
        client: Changed in place.
        task: The run's; language models predict every next token, classifiers one class.
        seed: Of the head's first values.
    """
    config: Any = client.config
    with rng_scope(seed):
        num_classes, pools = TASKS[task].num_outputs(config), TASKS[task].pools
        head = AuxiliaryHead(config.hidden_size, num_classes, pools=pools)
    client.add_module(AUXILIARY, head.to(client.device, client.dtype))
    client.remote.register_forward_pre_hook(head.note)


def auxiliary_head_of(client: nn.Module) -> AuxiliaryHead:
    """The head that `add_auxiliary_head` gave the client.

    Raises:
        ConfigError: It has none.
    """
    head = getattr(client, AUXILIARY, None)
    if not isinstance(head, AuxiliaryHead):
        raise ConfigError(
            "train.mode=isolated trains the bottom on an auxiliary head, but this client has none; "
            "call add_auxiliary_head(client, run.task, run.seed) first"
        )
    return head


def _mean(hidden_BTD: Tensor, attention_mask_BT: Tensor | None) -> Tensor:
    if attention_mask_BT is None:
        return hidden_BTD.mean(dim=1)
    weights_BT1 = attention_mask_BT.to(hidden_BTD.dtype).unsqueeze(-1)
    return (hidden_BTD * weights_BT1).sum(dim=1) / weights_BT1.sum(dim=1)
