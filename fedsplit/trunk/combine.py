"""The combinations of the clients' gradients into one: their mean, median or trimmed mean."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

Gradients = dict[str, Tensor]
"""The gradients of the trained parameters by name; a parameter without a gradient is missing."""

Combination = Callable[[Sequence[Gradients], Sequence[float]], Gradients]
"""Returns one gradient; may change the tensors in place.

Its arguments are the gradients of each client in a fixed order, and the clients' weights, which sum
to one.
"""


def mean(gradients: Sequence[Gradients], weights: Sequence[float]) -> Gradients:
    """Return the weighted mean; a missing gradient counts as zero."""
    # The clients' order is fixed, so that the sum does not depend on the order of arrival.
    total: Gradients = {}
    for each, weight in zip(gradients, weights, strict=True):
        for name, gradient in each.items():
            # In place: a contribution is used once, and a copy would take its memory again.
            part = gradient if weight == 1.0 else gradient.mul_(weight)
            total[name] = total[name].add_(part) if name in total else part
    return total


def median(gradients: Sequence[Gradients], weights: Sequence[float]) -> Gradients:
    """Return the median of every coordinate, without weights.

    Yin, Chen, Ramchandran and Bartlett 2018, "Byzantine-Robust Distributed Learning: Towards
    Optimal Statistical Rates", ICML, arXiv 1803.01498, definition 1. Of an even number of values
    it is the mean of the middle two.
    """
    return _without_extremes(gradients, (len(gradients) - 1) // 2)


def trimmed_mean(gradients: Sequence[Gradients], weights: Sequence[float]) -> Gradients:
    """Return the mean of every coordinate without its largest and smallest values, unweighted.

    A quarter of the values is left out at each side, and of three values one; definition 2 of the
    paper above.
    """
    number = len(gradients)
    return _without_extremes(gradients, max(number // 4, int(number == 3)))


def _without_extremes(gradients: Sequence[Gradients], left_out: int) -> Gradients:
    names = dict.fromkeys(name for each in gradients for name in each)
    return {name: _middle([each.get(name) for each in gradients], left_out) for name in names}


def _middle(values: Sequence[Tensor | None], left_out: int) -> Tensor:
    like = next(value for value in values if value is not None)
    zeros = torch.zeros_like(like)
    stacked = torch.stack([zeros if value is None else value for value in values])
    return stacked.sort(dim=0).values[left_out : len(values) - left_out].mean(dim=0)


COMBINATIONS: Mapping[str, Combination] = MappingProxyType(
    {"mean": mean, "median": median, "trimmed": trimmed_mean}
)
"""The combinations by the name that `policy.combine` has for them."""
