"""A count of the bytes of activations that autograd saves in a forward for the backward."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class ByteCount:
    """The number of bytes of activations that a forward saves for its backward.

    Args:
        weights: Tensors that are not counted, since they exist without the forward.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        # By storage and not by tensor, since autograd also saves views.
        # A DTensor has no storage of its own.
        shards = (getattr(weight, "_local_tensor", weight) for weight in weights)
        self._weights = {shard.untyped_storage().data_ptr() for shard in shards}
        self._storages: dict[int, int] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all saved storages, each counted once."""
        return sum(self._storages.values())

    @contextmanager
    def counting(self) -> Iterator[None]:
        """A context in which the tensors that autograd saves are counted."""

        def count(tensor: Tensor) -> Tensor:
            storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
            if storage.data_ptr() not in self._weights:
                self._storages[storage.data_ptr()] = storage.nbytes()
            # A saved output would refer to its own graph and keep it alive.
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            yield
