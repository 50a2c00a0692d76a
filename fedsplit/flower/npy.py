"""Reading Flower's arrays, whose bytes are files of NumPy's `.npy` format.

`Array.numpy` parses the header as Python source. CPython's parser keeps its depth for the whole
process, so in 3.11 it sometimes fails with a `SystemError` if two threads parse at a time, and
clients of a simulation are threads. Here the header is compared with the one that NumPy writes.
"""

import io
import math

import numpy as np
import torch
from flwr.app import Array
from numpy.lib import format as npy
from torch import Tensor

from fedsplit.errors import BadTensor

_DTYPES = {
    name: np.dtype(name)
    for name in ("bool", "float16", "float32", "float64")
    + ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
}
_MAX_RANK = 32  # the most dimensions of an array in NumPy 1


def values_of(array: Array) -> np.ndarray:
    """Return a copy of an array's values, in its announced dtype and shape.

    Raises:
        BadTensor: The bytes are not those of a `.npy` file with this dtype and shape, or the dtype
            is not a plain one.
    """
    shape, dtype = tuple(array.shape), _DTYPES.get(array.dtype)
    if dtype and len(shape) <= _MAX_RANK and min(shape, default=0) >= 0:
        # NumPy writes an array with transposed strides in Fortran order.
        for order in ("C", "F"):
            header = _header(dtype, shape, is_fortran=order == "F")
            nbytes = len(header) + math.prod(shape) * dtype.itemsize
            if len(array.data) == nbytes and array.data.startswith(header):
                flat = np.frombuffer(array.data, dtype, offset=len(header))
                return flat.reshape(shape, order=order).copy()
    raise BadTensor(
        f"{len(array.data)} bytes arrived as an array of {array.dtype} with shape {shape}, but are "
        "not its .npy file; build arrays with flwr.app.Array(ndarray)"
    )


def tensor_of(array: Array) -> Tensor:
    """Return an array's values as a tensor; see `values_of`."""
    return torch.from_numpy(values_of(array))


def _header(dtype: np.dtype, shape: tuple[int, ...], *, is_fortran: bool) -> bytes:
    file = io.BytesIO()
    descr = npy.dtype_to_descr(dtype)
    npy.write_array_header_1_0(file, {"descr": descr, "fortran_order": is_fortran, "shape": shape})
    return file.getvalue()
