"""The auxiliary head: the bottom trains on its loss if the trunk returns no gradient.

Belilovsky, Eickenberg and Oyallon 2020, "Decoupled Greedy Learning of CNNs", arXiv 1901.08164;
for split learning Han, Bhatti, Lee and Moon 2021, "Accelerating Federated Learning with Split
Learning on Locally Generated Losses".

Shapes: B sequences, T tokens, D hidden width, C classes (a language model's vocabulary size).
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

# The `initializer_range` that most families of transformers use for their own heads.
_STD = 0.02


class AuxiliaryHead(nn.Module):
    """A norm and a linear layer that predict the model's output from the smashed data.

    Args:
        hidden_size: D.
        num_classes: C.
        pools: Whether the head makes one prediction per sequence instead of one per token.
    """

    def __init__(self, hidden_size: int, num_classes: int, *, pools: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.head = nn.Linear(hidden_size, num_classes)
        nn.init.normal_(self.head.weight, std=_STD)
        nn.init.zeros_(self.head.bias)
        self._pools = pools
        # One entry per thread, since several threads may run one client. The weak keys drop the
        # tensor, and the graph behind it, of a thread that has ended.
        self._smashed_BTD: WeakKeyDictionary[threading.Thread, Tensor] = WeakKeyDictionary()

    def note(self, _: nn.Module, sent: tuple[Any, ...]) -> None:
        """Keep the smashed data and its graph; a forward pre-hook of the `Remote` layer."""
        # A forward without gradients also clears the entry, so that `forward` cannot use the
        # smashed data of an earlier batch.
        self._smashed_BTD.pop(threading.current_thread(), None)
        if torch.is_grad_enabled():
            self._smashed_BTD[threading.current_thread()] = sent[0]

    def forward(self, attention_mask_BT: Tensor | None = None) -> Tensor:
        """Logits for the smashed data of this thread's last forward, which can be used once.

        Args:
            attention_mask_BT: 1 for a token, 0 for padding.

        Returns:
            [B, T, C]; [B, C] of the mean over all tokens but padding if the head pools.

        Raises:
            ConfigError: The client has run no forward with gradients since the last call.
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
    """Add a trainable head named `auxiliary` to the client's bottom.

    `join_model` and checkpoints leave the head out. Add adapters first, since `add_adapters`
    freezes all existing parameters. The caller's random state does not change.

    Args:
        client: The part; changed in place.
        task: The run's task. Language models predict every next token, classifiers one class.
        seed: The seed of the head's initial values.
    """
    config: Any = client.config
    with rng_scope(seed):
        num_classes, pools = TASKS[task].num_outputs(config), TASKS[task].pools
        head = AuxiliaryHead(config.hidden_size, num_classes, pools=pools)
    client.add_module(AUXILIARY, head.to(client.device, client.dtype))
    client.remote.register_forward_pre_hook(head.note)


def auxiliary_head_of(client: nn.Module) -> AuxiliaryHead:
    """The head that `add_auxiliary_head` added to the client.

    Raises:
        ConfigError: The client has no such head.
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
    # A plain mean would count the padding.
    weights_BT1 = attention_mask_BT.to(hidden_BTD.dtype).unsqueeze(-1)
    return (hidden_BTD * weights_BT1).sum(dim=1) / weights_BT1.sum(dim=1)
