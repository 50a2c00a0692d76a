"""Linear layers that compute one token in bfloat16 on a CPU without packing their weight.

torch multiplies matrices in bfloat16 by oneDNN, which packs a weight anew in every call. With many
rows that is little beside the product. With one row, as in decoding, it takes longer than the
product, and a product with a vector reads the weight once.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class SingleRowLinear(nn.Linear):
    """An `nn.Linear` that multiplies a single row in bfloat16 on a CPU as a vector.

    Both products sum in float32 and round once, so they differ by at most that rounding.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[..., out_features] for an input of [..., in_features]."""
        # Under autocast, input and weight may have different types.
        is_half = input.dtype is self.weight.dtype is torch.bfloat16
        if not (is_half and input.is_cpu and input.numel() == self.in_features):
            return super().forward(input)
        row, shape = input.reshape(self.in_features), (*input.shape[:-1], self.out_features)
        if self.bias is None:
            return torch.mv(self.weight, row).view(shape)
        return torch.addmv(self.bias, self.weight, row).view(shape)


def with_single_rows(model: M) -> M:
    """The model; its plain linear layers are changed in place to `SingleRowLinear`.

    Weights, names and hooks stay, and layers of other classes, such as quantized ones, too.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = SingleRowLinear
    return model
