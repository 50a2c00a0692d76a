"""The tensors of safetensors files: their names, copies of some, and those that are read later."""

from pathlib import Path
from typing import Any

from torch import Tensor

from fedsplit.model.identity import opened
from fedsplit.model.quantization import refuse_quantized

# Beginnings of the dtypes of quantized weights.
_QUANTIZED = ("F8", "F6", "F4", "I8", "U8")


class LazyTensor:
    """A tensor of a file that is read when its values are asked for: `tensor[...]`.

    It has the methods of slices of safetensors, which transformers loads in this way. A rank reads
    only its piece of a tensor that is cut. Tensors that are quantized one after the other need not
    be in memory together.

    Args:
        path: The file.
        name: The tensor's name in it.
        mapped: Whether the values stay in the file, which is mapped into memory. Copies of tensors
            that are quantized, freed one after the other, would leave as much memory in pieces as
            they have together.
    """

    is_meta = False

    def __init__(self, path: Path, name: str, *, mapped: bool = False) -> None:
        self._path, self._name, self._mapped = path, name, mapped

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return tuple(self.get_shape())

    def get_shape(self) -> list[int]:
        """Return the shape of the whole tensor."""
        with opened(self._path) as file:
            shape: list[int] = file.get_slice(self._name).get_shape()
        return shape

    def get_dtype(self) -> str:
        """Return the dtype, as safetensors names it."""
        with opened(self._path) as file:
            dtype: str = file.get_slice(self._name).get_dtype()
        return dtype

    def __getitem__(self, index: Any) -> Tensor:
        """Return the values at `index`; see `read_tensors`.

        Raises:
            CheckpointError: The file cannot be read.
        """
        with opened(self._path) as file:
            if self._mapped:
                tensor: Tensor = file.get_tensor(self._name)
                return tensor[index]
            piece: Tensor = file.get_slice(self._name)[index]
        return piece.clone()


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
