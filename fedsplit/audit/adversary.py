"""What an honest but curious server knows of one cut of a model, computed when it is needed.

Shapes: B sequences, T tokens, V vocabulary, D hidden width, N rows.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedsplit.audit.scene import Scene
from fedsplit.client.privacy import PublicRows
from fedsplit.model import SplitModel, connect


class Adversary:
    """The server of a run, or of one with a deeper bottom.

    Args:
        scene: The run.
        more_blocks: The blocks by which the bottom is deeper.
    """

    def __init__(self, scene: Scene, more_blocks: int = 0) -> None:
        self.bottom = scene.split(more_blocks).bottom
        self._scene = scene
        self._more_blocks = more_blocks

    @cached_property
    def ends(self) -> PreTrainedModel:
        """The client's blocks as an ordinary model."""
        return self._scene.ends(self._more_blocks)

    @cached_property
    def head_VD(self) -> Tensor:
        """The weights of the head."""
        head: Any = self._scene.whole.get_output_embeddings()
        weights_VD: Tensor = head.weight.detach().float()
        return weights_VD

    @cached_property
    def public_ND(self) -> Tensor:
        """The rows of public text at the cut."""
        model: Any = self.ends.base_model
        with torch.no_grad():
            states = model(self._scene.public_BT, output_hidden_states=True).hidden_states
        rows_ND: Tensor = states[self.bottom].flatten(0, 1).float()
        return rows_ND

    @cached_property
    def public(self) -> PublicRows:
        """The statistics of these rows."""
        return PublicRows.of(self.public_ND)

    @cached_property
    def grad_radius(self) -> float:
        """The median norm of the rows of the gradient of the trunk's output, for public text."""
        top = _Top(self._parts, self._scene.others_BT)
        return float(top.gradient(self._scene.others_BT[:, 1:]).norm(dim=-1).median())

    def gradient(self, labels_BT: Tensor) -> Tensor:
        """Return the gradient of the trunk's output in the private step, for labels of its text."""
        return self._top.gradient(labels_BT)

    @cached_property
    def _parts(self) -> SplitModel:
        return self._scene.parts(self._more_blocks)

    @cached_property
    def _top(self) -> "_Top":
        # Of the text, the top gets the trunk's output alone, which the server has computed.
        return _Top(self._parts, self._scene.private_BT)


class _Top:
    """The top after a step's forward: the loss, and its gradient, for any labels."""

    def __init__(self, parts: SplitModel, ids_BT: Tensor) -> None:
        self._client = parts.client
        self._ids_BT = ids_BT
        self._outputs: list[Tensor] = []

        def carry(*inputs: Tensor, **named: Any) -> Tensor:
            self._outputs.append(parts.trunk.run(*inputs, **named).detach())
            return self._outputs[0]

        connect(parts.client, carry)
        with torch.no_grad():
            parts.client(input_ids=ids_BT, use_cache=False)

    def gradient(self, labels_BT: Tensor) -> Tensor:
        """Return the gradient [B, T, D] at the tokens that have a label."""
        out_BTD = self._outputs[0].requires_grad_()
        connect(self._client, lambda *inputs, **named: out_BTD)
        whole_BT = torch.cat((self._ids_BT[:, :1], labels_BT), dim=1)
        loss = self._client(input_ids=self._ids_BT, labels=whole_BT, use_cache=False).loss
        (grad_BTD,) = torch.autograd.grad(loss, out_BTD)
        return grad_BTD[:, :-1]
