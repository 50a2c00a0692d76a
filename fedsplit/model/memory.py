"""How much memory a forward leaves behind: the activations that autograd keeps for a backward."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class ByteCount:
    """How many bytes of activations a forward leaves behind for its backward.

    Args:
        weights: Tensors that are there anyway and do not count.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._storages: dict[int, int] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all storages seen, each once."""
        return sum(self._storages.values())

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what autograd saves in this block."""

        def see(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._weights:
                self._storages[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # itself, it would keep its own graph alive

        with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
            yield
