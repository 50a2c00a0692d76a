"""FedProx: a term that keeps the client weights near their values at the start of a round.

Li et al. 2020, "Federated Optimization in Heterogeneous Networks", arXiv 1812.06127.
"""

from collections.abc import Iterable

from torch import nn


class ProximalTerm:
    """The term `mu / 2 * ||w - w_start||^2` of a client's loss.

    Args:
        parameters: The parameters w; their values now are w_start.
        mu: Weight of the term; 0 turns it off.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], mu: float) -> None:
        self._mu = mu
        self._starts = [(p, p.detach().clone()) for p in parameters] if mu else []

    def add_gradient(self) -> None:
        """Add the term's gradient, `mu * (w - w_start)`, to the gradients of the parameters."""
        for parameter, start in self._starts:
            pull = (parameter.detach() - start).mul_(self._mu)
            parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)
