"""The tensors of safetensors files: their names, copies of some, and those that are read later."""

from pathlib import Path
from typing import Any

from torch import Tensor

from fedsplit.model.identity import opened
from fedsplit.model.quantization import refuse_quantized

# Beginnings of the dtypes of quantized weights.
_QUANTIZED = ("F8", "F6", "F4", "I8", "U8")


class LazyTensor:
    """A tensor of a file that is mapped into memory when its values are asked for: `tensor[...]`.

    transformers loads slices of safetensors so. Tensors that it quantizes one after the other need
    not be in memory together. Copies of them, freed one after the other, would leave as much memory
    in pieces as they have together.

    Args:
        path: The file.
        name: The tensor's name in it.
    """

    is_meta = False

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        with opened(path) as file:
            self.shape = tuple(file.get_slice(name).get_shape())

    def __getitem__(self, index: Any) -> Tensor:
        """Return the values at `index`, in the mapped file; see `read_tensors`."""
        with opened(self._path) as file:
            tensor: Tensor = file.get_tensor(self._name)
        return tensor[index]


def require_floats(path: Path, names: list[str]) -> None:
    """Refuse tensors in the formats of quantized weights, where the config has no method.

    Raises:
        UnsupportedModel: There is one.
        CheckpointError: The file cannot be read.
    """
    with opened(path) as file:
        for name in names:
            dtype: str = file.get_slice(name).get_dtype()
            if dtype.startswith(_QUANTIZED):
                refuse_quantized(dtype, f"{path}: '{name}'")


def tensor_names(path: Path) -> list[str]:
    """The names of the tensors in a safetensors file, from its header.

    Raises:
        CheckpointError: The file cannot be read.
    """
    with opened(path) as file:
        return list(file.keys())


def read_tensors(path: Path, names: list[str]) -> dict[str, Tensor]:
    """Copies of these tensors of a safetensors file; no other tensor is read.

    Raises:
        CheckpointError: The file is damaged or lacks a tensor.
    """
    with opened(path) as file:
        # Tensors of the mapped file may be unaligned, which changes the rounding of kernels.
        return {name: file.get_tensor(name).clone() for name in names}
