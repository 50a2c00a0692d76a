"""Tensors as bytes, and bytes as tensors.

On the wire a tensor is its raw little-endian bytes in row-major order, or what a codec of
`fedsplit.wire.compression` made of it. Everything here raises before it takes memory, and never
asserts; whether a value is finite is for the trunk's guard to say.
"""

import math
from dataclasses import Field, dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedsplit.errors import BadTensor
from fedsplit.wire.compression import READERS, writer
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
"""Every dtype that may cross the wire, by name."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMeta:
    """What a peer says about the bytes of one tensor; `codec` names how they were compressed."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    codec: str = "none"

    def check(self) -> None:
        """Refuse a description that cannot be true.

        Raises:
            BadTensor: An unknown dtype or codec, a rank that is not 1 to 4, a dimension below
                1, or a length that is not the shape's; a lossy codec of what is no float.
        """
        if self.dtype not in DTYPES:
            raise BadTensor(f"dtype {self.dtype!r} is not one of: {', '.join(DTYPES)}")
        if self.codec != "none" and self.codec not in READERS:
            raise BadTensor(f"codec {self.codec!r} is not one of: none, {', '.join(READERS)}")
        if not 1 <= len(self.shape) <= 4:
            raise BadTensor(f"a tensor of rank {len(self.shape)} was sent; ranks 1 to 4 are taken")
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
        """What the tensor takes in memory."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def rows(self) -> tuple[int, int]:
        """How many rows a codec sees, and their width."""
        return math.prod(self.shape[:-1]), self.shape[-1]

    def _check_compressed(self) -> None:
        if not DTYPES[self.dtype].is_floating_point:
            raise BadTensor(f"codec {self.codec} is for floats, but the tensor is {self.dtype}")
        READERS[self.codec].check(self.nbytes, *self.rows)


def encode_tensor(
    tensor: Tensor, codec: str = "none", base: Tensor | None = None
) -> tuple[TensorMeta, memoryview]:
    """Describe a tensor, or its difference from a base of its shape, and show the bytes.

    With codec `none`, and of whole numbers, they are its own, copied only if it is strided or on
    another device; there is no difference then.

    Raises:
        BadTensor: The tensor's dtype or shape may not cross the wire.
        ConfigError: There is no such codec.
    """
    dtype = NAMES.get(tensor.dtype, str(tensor.dtype))
    meta = TensorMeta(dtype=dtype, shape=tuple(tensor.shape), nbytes=tensor.nbytes)
    meta.check()
    held = tensor.detach()
    if codec != "none" and tensor.is_floating_point():
        name, compress = writer(codec)
        rows_ND = held.reshape(-1, held.shape[-1]).float().contiguous()
        if base is None:
            held = compress.encode(rows_ND)
        else:
            held = compress.encode(rows_ND - base.to(rows_ND).view_as(rows_ND), rows_ND)
        meta = replace(meta, nbytes=held.nbytes, codec=name)
    flat = held.cpu().contiguous().view(-1).view(torch.uint8)
    return meta, flat.numpy().data


def decode_tensor(meta: TensorMeta, buffer: bytearray | memoryview, offset: int = 0) -> Tensor:
    """The tensor whose bytes begin at `offset`.

    With codec `none` it shares the buffer's memory, which is writable.

    Raises:
        BadTensor: The description is wrong, or the buffer is too short for it, or not what its
            codec makes.
    """
    meta.check()
    if not 0 <= offset <= len(buffer) - meta.nbytes:
        raise BadTensor(
            f"a tensor of {meta.nbytes} bytes at offset {offset} lies outside of "
            f"a payload of {len(buffer)} bytes"
        )
    flat = torch.frombuffer(buffer, dtype=torch.uint8, count=meta.nbytes, offset=offset)
    if meta.codec != "none":
        rows_ND = READERS[meta.codec].decode(flat, *meta.rows)
        return rows_ND.view(meta.shape).to(DTYPES[meta.dtype])
    if meta.dtype == "bool":  # a byte other than 0 and 1 would be a bool that is neither
        return flat.ne(0).view(meta.shape)
    return flat.view(DTYPES[meta.dtype]).view(meta.shape)


def through_codec(message: M) -> M:
    """The message as its receiver would have it: every tensor a detached, independent copy."""
    original: Any = message
    codec, base = how_of(original)
    copies: dict[str, Any] = {}
    for name in (each.name for each in traveling(type(original))):
        value = getattr(original, name)
        if isinstance(value, Tensor):
            copies[name] = as_received(value, codec, base)
        elif isinstance(value, tuple):
            copies[name] = tuple(map(_copied, value))
        else:
            copies[name] = value
    copy: M = type(original)(**copies)
    return copy


def traveling(message: Any) -> list[Field[Any]]:
    """The fields of a message, or of its class, that its receiver gets."""
    return [each for each in fields(message) if each.metadata != STAYS]


def how_of(message: object) -> tuple[str, Tensor | None]:
    """How the float tensors of a message travel: by which codec, as differences from what."""
    return getattr(message, "codec", "none"), getattr(message, "base_BTD", None)


def as_received(tensor: Tensor, codec: str, base: Tensor | None = None) -> Tensor:
    """What the other side makes of a tensor's bytes, in memory of its own, on the CPU."""
    meta, raw = encode_tensor(tensor, codec, base)
    return decode_tensor(meta, bytearray(raw))


def _copied(item: Any) -> Any:
    """An item of a message: it travels without a codec."""
    if isinstance(item, Tensor):
        return as_received(item, "none")
    return through_codec(item) if isinstance(item, KVCacheEntry) else item
