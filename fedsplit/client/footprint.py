"""The memory that training takes at a client, counted tensor by tensor."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from fedsplit.model.memory import ByteCount
from fedsplit.optimization import PartOptimizer


class Footprint:
    """Bytes of a client's weights, gradients, moments and saved activations in its first step.

    All steps take the same memory, so only the first one is measured. Gradients are counted for
    all trained parameters, and activations for the largest batch, up to its backward. Temporary
    buffers of kernels are not counted.

    Args:
        model: The model that is trained.
        at_once: The number of forwards that may wait for the rest of their backward at a time. The
            backward of the top is over before the last of them begins, so this count is an upper
            bound.
    """

    def __init__(self, model: nn.Module, at_once: int = 1) -> None:
        self.num_bytes = 0
        self._model = model
        self._at_once = at_once
        self._activations: list[int] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A context around the forward of each batch, or of each micro-batch."""
        # After the first step the count is complete, and hooks would only cost time.
        if self.num_bytes:
            yield
            return
        count = ByteCount(self._weights())
        with count.counting():
            yield
        self._activations.append(count.num_bytes)

    def stepped(self, optimizer: PartOptimizer) -> None:
        """Complete the count; call it after each step of the optimizer."""
        if not self.num_bytes:
            # The trained parameters stand for their gradients, which have the same size.
            held = (self._weights(), optimizer.parameters.values(), optimizer.state().values())
            # The largest forwards are assumed to wait for their backward at the same time.
            activations = sum(sorted(self._activations)[-self._at_once :])
            self.num_bytes = activations + sum(_bytes_of(tensors) for tensors in held)

    def _weights(self) -> list[Tensor]:
        return [*self._model.parameters(), *self._model.buffers()]


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
