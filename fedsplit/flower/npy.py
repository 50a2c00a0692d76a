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


def values_of(array: Array) -> np.ndarray:
    """Return a copy of an array's values, in its announced dtype and shape.

    Raises:
        BadTensor: The bytes are not those of a `.npy` file with this dtype and shape.
    """
    shape = tuple(array.shape)
    try:
        dtype = np.dtype(array.dtype)
    except TypeError:
        dtype = np.dtype(object)
    if not dtype.hasobject:
        # NumPy writes an array with transposed strides in Fortran order.
        for order in ("C", "F"):
            header = _header(dtype, shape, is_fortran=order == "F")
            if array.data.startswith(header) and len(array.data) == len(header) + (
                math.prod(shape) * dtype.itemsize
            ):
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
