"""The check that a tensor of a peer holds numbers to compute with; servers and clients share it."""

import math

from torch import Tensor

from fedsplit.errors import NonFinite


def refuse_non_finite(tensor: Tensor, name: str, advice: str, *, most: float = math.inf) -> None:
    """Refuse a tensor that holds NaN, Inf or a value beyond a bound.

    Args:
        tensor: Floats, in any shape.
        name: The tensor's name, for the text of the error.
        advice: What else the text says.
        most: The largest magnitude to accept; by default every finite one.

    Raises:
        NonFinite: It does; the message has the name, and the number or the size of such values.
    """
    # One pass over the memory, and NaN makes both ends NaN.
    low, high = tensor.aminmax()
    largest = max(-low.item(), high.item())
    if math.isfinite(largest) and largest <= most:
        return
    if bad := int((~tensor.isfinite()).sum()):
        found = f"{bad} of {tensor.numel()} values that are NaN or Inf"
    else:
        found = f"values up to {largest:g}, and {most:g} is the largest to accept"
    raise NonFinite(f"{name} holds {found}; {advice}")
