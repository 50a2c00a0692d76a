"""How much memory training takes at a client, counted tensor by tensor."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from fedsplit.model.memory import ByteCount
from fedsplit.optimization import PartOptimizer


class Footprint:
    """Bytes of a client's weights, gradients, moments and saved activations in its first step.

    Steps are alike, so only the first one is measured. The gradients are those of all trained
    parameters, the activations those of the largest batch, up to its backward. What kernels take
    for a moment is not counted.

    Args:
        model: What trains.
        at_once: How many forwards may wait for the rest of their backward at a time. That of the
            top is over before the last of them begins, so what they hold is less than counted.
    """

    def __init__(self, model: nn.Module, at_once: int = 1) -> None:
        self.num_bytes = 0
        self._model = model
        self._at_once = at_once
        self._activations: list[int] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around the forward of each batch, or of each piece of one."""
        if self.num_bytes:
            yield
            return
        count = ByteCount(self._weights())
        with count.counting():
            yield
        self._activations.append(count.num_bytes)

    def stepped(self, optimizer: PartOptimizer) -> None:
        """After each step of the optimizer."""
        if not self.num_bytes:
            kept = (self._weights(), optimizer.parameters.values(), optimizer.state().values())
            activations = sum(sorted(self._activations)[-self._at_once :])
            self.num_bytes = activations + sum(_bytes_of(tensors) for tensors in kept)

    def _weights(self) -> list[Tensor]:
        return [*self._model.parameters(), *self._model.buffers()]


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
