"""The naive design, as a reference: pickled numpy arrays in zlib, one unary call for each pass.

Implementations of split learning often do this: each array is pickled, compressed at zlib's default
level, and sent as one message. The benchmark unpickles only its own bytes. No other code may use
pickle; a house test names this file as its one exception.
"""

import pickle
import zlib
from typing import Any

import numpy as np


def packed(array: "np.ndarray[Any, Any]") -> bytes:
    """Return the message with an array."""
    return zlib.compress(pickle.dumps(array))


def unpacked(message: bytes) -> "np.ndarray[Any, Any]":
    """Return the array of a message."""
    array: np.ndarray[Any, Any] = pickle.loads(zlib.decompress(message))
    return array


def answered(message: bytes) -> bytes:
    """Unpack a message and pack its array again, as a server without a trunk."""
    return packed(unpacked(message))
