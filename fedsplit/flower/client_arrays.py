"""The client weights in Flower's arrays: uncompressed, or compressed by a codec of the wire.

A compressed array is an array of bytes: its last dimension is the codec's encoding of one row. The
receiver knows the shapes, because both sides build the same model.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict

from fedsplit.errors import BadTensor, ModelMismatch
from fedsplit.flower.npy import tensor_of, values_of
from fedsplit.flower.records import ARRAYS
from fedsplit.wire.compression import writer

Shape = tuple[int, ...]

AS_THEY_ARE = ("none", "nothing", "sealed")
"""The values of `RunSpec.client_weights_codec` that compress nothing."""


def pack(content: RecordDict, codec: str) -> ArrayRecord:
    """Compress the client weights of a message with a `RunSpec.client_weights_codec`.

    Returns:
        The weights as the client decodes them.
    """
    arrays = content.array_records.get(ARRAYS, ArrayRecord())
    if codec in AS_THEY_ARE:
        return arrays
    content[ARRAYS] = carried = packed(arrays, codec)
    return unpacked(carried, codec, shapes_of(arrays))


def packed(arrays: ArrayRecord, codec: str) -> ArrayRecord:
    """Return client weights compressed by a `RunSpec.client_weights_codec`."""
    if codec in AS_THEY_ARE:
        return arrays
    return ArrayRecord({name: _compressed(array, codec) for name, array in arrays.items()})


def unpacked(arrays: ArrayRecord, codec: str, shapes: Mapping[str, Shape]) -> ArrayRecord:
    """Return the decompressed client weights, in float32.

    Args:
        arrays: The arrays that arrived.
        codec: The codec that packed them.
        shapes: The expected shapes, by name.

    Raises:
        ModelMismatch: Other arrays arrived.
        BadTensor: Their bytes are not the codec's encoding of such shapes.
    """
    if codec in AS_THEY_ARE:
        return arrays
    if odd := sorted(arrays.keys() ^ shapes.keys()):
        raise ModelMismatch(
            f"{len(arrays)} arrays of client weights arrived, not {len(shapes)}; the first "
            f"difference is {odd[0]!r}; start both sides from the same model and config"
        )
    return ArrayRecord({n: _restored(n, array, codec, shapes[n]) for n, array in arrays.items()})


def shapes_of(arrays: ArrayRecord) -> dict[str, Shape]:
    """Return the shapes of a record's arrays, by name."""
    return {name: tuple(array.shape) for name, array in arrays.items()}


def _compressed(array: Array, codec: str) -> Array:
    # A codec works on rows, so a scalar is a row of one value.
    values = np.atleast_1d(values_of(array))
    rows_ND = torch.from_numpy(values.reshape(-1, values.shape[-1])).float()
    bytes_NM = writer(codec)[1].encode(rows_ND)
    return Array(bytes_NM.numpy().reshape(*values.shape[:-1], -1))


def _restored(name: str, array: Array, codec: str, shape: Shape) -> Array:
    *outer, width = shape or (1,)
    if array.dtype != "uint8" or tuple(array.shape[:-1]) != tuple(outer):
        raise BadTensor(
            f"{name} arrived as {array.dtype} of shape {tuple(array.shape)}, which is not the "
            f"{codec} encoding of shape {shape}; start both sides from the same model and config"
        )
    kind, num_rows = writer(codec)[1], math.prod(outer)
    bytes_M = tensor_of(array).view(-1)
    # The bytes are a peer's: check their number before the codec reads them.
    kind.check(bytes_M.numel(), num_rows, width)
    return Array(kind.decode(bytes_M, num_rows, width).numpy().reshape(shape))
