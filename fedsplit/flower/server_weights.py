"""The client weights at the server: parameters of its model, or sealed sums that it cannot read."""

from collections.abc import Mapping
from typing import Protocol

from flwr.app import ArrayRecord
from torch import Tensor
from transformers import PreTrainedModel

from fedsplit.client.seal import SealedWeights
from fedsplit.flower.records import load_arrays, to_arrays
from fedsplit.flower.sealed_arrays import record_of, sealed_of
from fedsplit.model.describe import shared
from fedsplit.spec import RunSpec


class ServerWeights(Protocol):
    """The client weights of a run, as its server holds them."""

    @property
    def arrays(self) -> ArrayRecord:
        """The weights as a message to clients has them; it may be set to those of a round."""
        ...

    @arrays.setter
    def arrays(self, arrays: ArrayRecord) -> None: ...

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors by name, from which a checkpoint restores the weights."""
        ...

    @tensors.setter
    def tensors(self, tensors: Mapping[str, Tensor]) -> None: ...


def weights_of(model: PreTrainedModel, run: RunSpec) -> ServerWeights:
    """Return the client weights of a run before training.

    Args:
        model: The server's copy of the client's part, or the unsplit model of a baseline.
        run: The run.
    """
    readable = ReadableWeights(model, run)
    return SealedArrays(readable, run.clients) if run.client_weights.sealed else readable


class ReadableWeights:
    """The client weights as parameters of the server's model."""

    def __init__(self, model: PreTrainedModel, run: RunSpec) -> None:
        self._model, self._run = model, run

    @property
    def arrays(self) -> ArrayRecord:
        """The weights as arrays."""
        return to_arrays(shared(self._model, self._run))

    @arrays.setter
    def arrays(self, arrays: ArrayRecord) -> None:
        load_arrays(shared(self._model, self._run), arrays)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The weights by name."""
        return {name: p.detach() for name, p in shared(self._model, self._run).items()}

    @tensors.setter
    def tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.arrays = to_arrays(tensors)


class SealedArrays:
    """The sum of sealed weights; the parameters of the server's model stay what they were.

    Args:
        like: Weights of the same names and shapes.
        clients: The number of clients of the run.
    """

    def __init__(self, like: ReadableWeights, clients: int) -> None:
        shapes = {name: tuple(array.shape) for name, array in like.arrays.items()}
        self.arrays = record_of(SealedWeights.none(shapes, clients))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The sealed weights as tensors."""
        return sealed_of(self.arrays).tensors

    @tensors.setter
    def tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.arrays = record_of(SealedWeights.of_tensors(tensors))
