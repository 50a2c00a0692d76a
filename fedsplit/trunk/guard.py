"""What is refused before it can reach a parameter: NaN and Inf, by name."""

import math

from torch import Tensor

from fedsplit.errors import NonFinite


def require_finite(tensor: Tensor, name: str) -> None:
    """Refuse a tensor that holds NaN or Inf.

    The sum is the cheap first look: it is finite for all but overflowing sums of finite entries.

    Raises:
        NonFinite: Names the tensor and how many entries are not finite.
    """
    if math.isfinite(tensor.sum().item()):
        return
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise NonFinite(
            f"{name} holds {bad} of {tensor.numel()} values that are NaN or Inf; it was refused "
            "and nothing was changed; lower the learning rate or look at this batch"
        )
