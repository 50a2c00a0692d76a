"""The trunk of the schedules, with six parameters, and its arithmetic for the checker's model.

Shapes: B sequences, T tokens, D hidden width. A block of a transformer would take most of the time
of a schedule. This trunk is as exact: its function of a token depends on all tokens before it and
on its position, and every number of it can be computed again with the same result.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig, PreTrainedModel

from fedsplit.model.kv_cache import GrowingLayer

WIDTH = 2
LR = 2.0**-6

Array = npt.NDArray[np.float32]
Values = dict[str, Array]
"""The parameters of the trunk, or their gradients, by name."""

FIRST: Values = {
    "bias": np.array([0.25, -0.5], np.float32),
    "mix": np.array([0.5, 0.25], np.float32),
    "scale": np.array([1.0, -0.75], np.float32),
}
"""The parameters of version 0."""

_POSITION = 2.0**-3


class PlainConfig(PretrainedConfig):
    """The config of the trunk; few fields, because each service makes a fingerprint of them."""

    def to_dict(self) -> dict[str, Any]:
        """Return what the trunk computes with."""
        return {"hidden_size": self.hidden_size, "model_type": "plain"}


class PlainTrunk(PreTrainedModel):
    """The output of a token is scale * x + mix * (sum of x up to here) + bias + its position / 8.

    It has what the trunk's service uses of a `TrunkPart`.
    """

    config_class = PlainConfig

    def __init__(self) -> None:
        sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 3}
        super().__init__(PlainConfig(**sizes))
        self.identity: dict[str, str] = {}
        self.family = type(self)
        self.plan = SimpleNamespace(backbone="")
        for name, value in FIRST.items():
            self.register_parameter(name, nn.Parameter(torch.from_numpy(value.copy())))

    def forward(
        self,
        smashed_BTD: Tensor,
        attention_mask_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Return the output; the cache holds the hidden states as keys and as values."""
        tokens, all_BTD = smashed_BTD.shape[1], smashed_BTD
        if cache is not None:
            new_BHTD = smashed_BTD[:, None]
            all_BTD = cache.update(new_BHTD, new_BHTD, 0)[0][:, 0]
        past = all_BTD.shape[1] - tokens
        if position_ids_BT is None:
            position_ids_BT = torch.arange(past, past + tokens)[None]
        sum_BTD = all_BTD.cumsum(1)[:, past:]
        scale, mix, bias = (self.get_parameter(name) for name in ("scale", "mix", "bias"))
        out_BTD = smashed_BTD * scale + sum_BTD * mix + bias
        return out_BTD + position_ids_BT[:, :, None] * _POSITION

    def run(self, smashed_BTD: Tensor, *inputs: Any, cache: Any = None, **named: Any) -> Tensor:
        """Call the trunk, as `TrunkPart.run` does."""
        out_BTD: Tensor = self(smashed_BTD, *inputs, cache=cache, **named)
        return out_BTD

    def new_cache(self, max_length: int | None = None) -> Cache:
        """Return a cache that grows."""
        layer: Any = GrowingLayer
        return Cache(layers=[layer()])

    def values(self) -> Values:
        """Return a copy of the present parameters."""
        return {name: each.detach().numpy().copy() for name, each in self.named_parameters()}

    def set_values(self, values: Values) -> None:
        """Give the trunk tensors of its own with these values."""
        for name, value in values.items():
            self._parameters[name] = nn.Parameter(torch.from_numpy(value.copy()))


def output_of(x_BTD: Array, values: Values, past: int = 0) -> Array:
    """Return what the trunk answers for hidden states, of which `past` came before the request."""
    positions_T = np.arange(past, x_BTD.shape[1], dtype=np.float32)
    out_BTD = x_BTD * values["scale"] + np.cumsum(x_BTD, 1) * values["mix"] + values["bias"]
    return out_BTD[:, past:] + positions_T[None, :, None] * np.float32(_POSITION)


def gradients_of(x_BTD: Array, grad_BTD: Array) -> Values:
    """Return the gradient of the parameters for that of the output."""
    return {
        "bias": grad_BTD.sum((0, 1)),
        "mix": (grad_BTD * np.cumsum(x_BTD, 1)).sum((0, 1)),
        "scale": (grad_BTD * x_BTD).sum((0, 1)),
    }


def input_gradient_of(grad_BTD: Array, values: Values) -> Array:
    """Return the gradient of the hidden states for that of the output."""
    mixed_BTD = grad_BTD * values["mix"]
    return grad_BTD * values["scale"] + np.cumsum(mixed_BTD[:, ::-1], 1)[:, ::-1]


def stepped(values: Values, gradients: Values, scale: float) -> Values:
    """Return the parameters after a step of plain SGD."""
    lr = np.float32(LR * scale)
    return {name: value - lr * gradients[name] for name, value in values.items()}
