"""The naive design, to measure against: pickled numpy arrays in zlib, one unary call a pass.

It is how a split model is often carried: each array pickled, compressed at zlib's own level, and
sent as one message. Only this bench reads it, and only what it wrote itself: nothing else may
unpickle, and a house test names this file as its one exception.
"""

import pickle
import zlib
from typing import Any

import numpy as np


def packed(array: "np.ndarray[Any, Any]") -> bytes:
    """An array as the naive design sends it."""
    return zlib.compress(pickle.dumps(array))


def unpacked(message: bytes) -> "np.ndarray[Any, Any]":
    """The array of a message."""
    array: np.ndarray[Any, Any] = pickle.loads(zlib.decompress(message))
    return array


def answered(message: bytes) -> bytes:
    """What a server without a trunk answers: the same array, through all of it again."""
    return packed(unpacked(message))
