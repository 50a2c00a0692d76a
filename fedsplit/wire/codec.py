"""The conversion of tensors to bytes and back.

On the wire a tensor is its raw little-endian bytes in row-major order, or the output of a codec of
`fedsplit.wire.compression`. All checks come before memory is allocated, and raise errors rather
than assert, because a peer's bytes are not our bug. The trunk's guard checks that values are
finite.
"""

import math
from dataclasses import Field, dataclass, fields
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedsplit.errors import BadTensor
from fedsplit.wire.compression import READERS, writer
from fedsplit.wire.lossy import MAX_WIDTH
from fedsplit.wire.messages import STAYS, KVCacheEntry

M = TypeVar("M")

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}
"""Every dtype that may be sent, by name."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""The name of every dtype that may be sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMeta:
    """A peer's description of the bytes of one tensor; `codec` names their compression."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    codec: str = "none"

    def check(self) -> None:
        """Check that the description is consistent.

        Raises:
            BadTensor: An unknown dtype or codec, a rank that is not 1 to 4, a dimension below
                1, a length that does not fit the shape, or a lossy codec with a dtype that is no
                float.
        """
        if self.dtype not in DTYPES:
            raise BadTensor(f"dtype {self.dtype!r} is not one of: {', '.join(DTYPES)}")
        if self.codec != "none" and self.codec not in READERS:
            raise BadTensor(f"codec {self.codec!r} is not one of: none, {', '.join(READERS)}")
        if not 1 <= len(self.shape) <= 4:
            raise BadTensor(
                f"a tensor of rank {len(self.shape)} was sent; ranks 1 to 4 are allowed"
            )
        if min(self.shape) < 1:
            raise BadTensor(f"shape {self.shape} has an empty dimension; each must be at least 1")
        if self.codec == "none" and self.nbytes != self.decoded_bytes:
            raise BadTensor(
                f"a {self.dtype} tensor of shape {self.shape} takes {self.decoded_bytes} bytes, "
                f"but {self.nbytes} were announced"
            )
        if self.codec != "none":
            self._check_compressed()

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the decoded tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def rows(self) -> tuple[int, int]:
        """The number of rows that a codec encodes, and the values in a row."""
        return math.prod(self.shape[:-1]), self.shape[-1]

    def _check_compressed(self) -> None:
        if not DTYPES[self.dtype].is_floating_point:
            raise BadTensor(f"codec {self.codec} is for floats, but the tensor is {self.dtype}")
        READERS[self.codec].check(self.nbytes, *self.rows)
        if self.shape[-1] > MAX_WIDTH:
            raise BadTensor(
                f"a row of {self.shape[-1]} values was sent with codec {self.codec}; at most "
                f"{MAX_WIDTH} are allowed"
            )


@lru_cache(maxsize=1024)
def described(dtype: str, shape: tuple[int, ...], nbytes: int, codec: str = "none") -> TensorMeta:
    """The checked description of a tensor; a client's tensors have few different ones.

    Raises:
        BadTensor: As `TensorMeta.check`.
    """
    meta = TensorMeta(dtype=dtype, shape=shape, nbytes=nbytes, codec=codec)
    meta.check()
    return meta


def encode_tensor(
    tensor: Tensor, codec: str = "none", base: Tensor | None = None
) -> tuple[TensorMeta, memoryview]:
    """Encode a tensor, or its difference from a base of the same shape.

    With codec `none`, and for integers, the bytes are the tensor's own, and `base` is not used.
    They are copied only if the tensor is strided or on another device.

    Returns:
        The description, and a view of the bytes.

    Raises:
        BadTensor: The tensor's dtype or shape may not be sent.
        ConfigError: There is no such codec.
    """
    dtype, shape = NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)
    meta, data = described(dtype, shape, tensor.nbytes), tensor
    if codec != "none" and tensor.is_floating_point():
        name, compress = writer(codec)
        rows_ND = data.detach().reshape(-1, data.shape[-1]).float().contiguous()
        if base is None:
            data = compress.encode(rows_ND)
        else:
            # The codec also gets the whole rows, since its error is relative to them.
            data = compress.encode(rows_ND - base.to(rows_ND).view_as(rows_ND), rows_ND)
        meta = described(dtype, shape, data.nbytes, name)
    # numpy has no bfloat16.
    array = (data.view(torch.int16) if data.dtype == torch.bfloat16 else data).numpy(force=True)
    # Before Python 3.12, numpy's types do not say that an array is a buffer.
    flat: Any = np.ascontiguousarray(array)
    return meta, memoryview(flat).cast("B")


def decode_tensor(meta: TensorMeta, buffer: bytearray | memoryview, offset: int = 0) -> Tensor:
    """The tensor whose bytes begin at `offset`.

    With codec `none` it shares the memory of the buffer, which must be writable.

    Raises:
        BadTensor: The description is inconsistent, the buffer is too short for it, or the bytes are
            no output of its codec.
    """
    described(meta.dtype, meta.shape, meta.nbytes, meta.codec)
    if not 0 <= offset <= len(buffer) - meta.nbytes:
        raise BadTensor(
            f"a tensor of {meta.nbytes} bytes at offset {offset} lies outside of "
            f"a payload of {len(buffer)} bytes"
        )
    dtype = DTYPES[meta.dtype]
    if meta.codec == "none" and dtype != torch.bool:
        count = meta.nbytes // dtype.itemsize
        return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).view(meta.shape)
    flat = torch.frombuffer(buffer, dtype=torch.uint8, count=meta.nbytes, offset=offset)
    if meta.codec != "none":
        rows_ND = READERS[meta.codec].decode(flat, *meta.rows, dtype)
        return rows_ND.view(meta.shape)
    # In torch a bool that is neither byte 0 nor 1 is undefined.
    return flat.ne(0).view(meta.shape)


def through_codec(message: M) -> M:
    """The message as its receiver gets it: every tensor is decoded, detached and independent."""
    original: Any = message
    codec, base = getattr(original, "codec", "none"), getattr(original, "base_BTD", None)
    copies: dict[str, Any] = {}
    for name in (each.name for each in traveling(type(original))):
        value = getattr(original, name)
        if isinstance(value, Tensor):
            copies[name] = as_received(value, codec, base)
        elif isinstance(value, tuple):
            copies[name] = tuple(map(_copied_item, value))
        else:
            copies[name] = value
    copy: M = type(original)(**copies)
    return copy


def traveling(message: Any) -> list[Field[Any]]:
    """The fields of a message, or of its class, that are sent."""
    return [each for each in fields(message) if each.metadata != STAYS]


def as_received(tensor: Tensor, codec: str, base: Tensor | None = None) -> Tensor:
    """The tensor as the receiver decodes it, in new memory on the CPU."""
    meta, raw = encode_tensor(tensor, codec, base)
    return decode_tensor(meta, bytearray(raw))


def _copied_item(item: Any) -> Any:
    """The received copy of an item of a tuple; items travel without a codec."""
    if isinstance(item, Tensor):
        return as_received(item, "none")
    return through_codec(item) if isinstance(item, KVCacheEntry) else item
