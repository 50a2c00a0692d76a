"""How the halves travel between a client and the strategy: as they are, or in fewer bytes.

A compressed array is one of bytes: its last dimension is what the codec made of a row. Whoever
receives it knows the shapes, because both sides build the same model.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from fedsplit.errors import BadTensor, ModelMismatch
from fedsplit.wire.compression import writer

Shape = tuple[int, ...]


def packed(arrays: ArrayRecord, codec: str) -> ArrayRecord:
    """Halves as they travel with a codec of `wire.halves`."""
    if codec == "none":
        return arrays
    return ArrayRecord({name: _compressed(array, codec) for name, array in arrays.items()})


def unpacked(arrays: ArrayRecord, codec: str, shapes: Mapping[str, Shape]) -> ArrayRecord:
    """Halves as their receiver has them, in float32.

    Args:
        arrays: What came.
        codec: How it was packed.
        shapes: What it should be, by name.

    Raises:
        ModelMismatch: Other arrays came.
        BadTensor: Their bytes are not what the codec makes of such shapes.
    """
    if codec == "none":
        return arrays
    if odd := sorted(arrays.keys() ^ shapes.keys()):
        raise ModelMismatch(
            f"the halves that came hold {len(arrays)} arrays, not {len(shapes)}; the first "
            f"difference is {odd[0]!r}; start both sides from the same model and config"
        )
    return ArrayRecord({n: _restored(n, array, codec, shapes[n]) for n, array in arrays.items()})


def shapes_of(arrays: ArrayRecord) -> dict[str, Shape]:
    """The shapes of a record's arrays, by name."""
    return {name: tuple(array.shape) for name, array in arrays.items()}


def _compressed(array: Array, codec: str) -> Array:
    values = np.atleast_1d(array.numpy())
    rows_ND = torch.from_numpy(values.reshape(-1, values.shape[-1])).float()
    bytes_NM = writer(codec)[1].encode(rows_ND)
    return Array(bytes_NM.numpy().reshape(*values.shape[:-1], -1))


def _restored(name: str, array: Array, codec: str, shape: Shape) -> Array:
    *outer, width = shape or (1,)
    if array.dtype != "uint8" or tuple(array.shape[:-1]) != tuple(outer):
        raise BadTensor(
            f"{name} came as {array.dtype} of shape {tuple(array.shape)}, which is no {codec} of "
            f"shape {shape}"
        )
    kind, num_rows = writer(codec)[1], math.prod(outer)
    bytes_M = torch.from_numpy(array.numpy().reshape(-1))
    kind.check(bytes_M.numel(), num_rows, width)
    return Array(kind.decode(bytes_M, num_rows, width).numpy().reshape(shape))
