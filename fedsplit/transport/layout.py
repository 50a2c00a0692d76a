"""The fields of messages by how they are written in protobuf, worked out once for each class."""

from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

from torch import Tensor

from fedsplit.wire.codec import traveling
from fedsplit.wire.messages import KVCacheEntry, Limits


class Kind(Enum):
    """The kind of a message's field, which decides its form in protobuf."""

    VALUE = "value"
    VALUES = "values"
    TENSOR = "tensor"
    TENSORS = "tensors"
    MAPPING = "mapping"
    LIMITS = "limits"
    ENTRIES = "entries"


_KINDS: dict[Any, Kind] = {
    Tensor: Kind.TENSOR,
    Tensor | None: Kind.TENSOR,
    tuple[Tensor, ...]: Kind.TENSORS,
    tuple[str, ...]: Kind.VALUES,
    dict[str, float]: Kind.MAPPING,
    dict[str, str]: Kind.MAPPING,
    Limits: Kind.LIMITS,
    tuple[KVCacheEntry, ...]: Kind.ENTRIES,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The fields of a class of messages that are sent.

    `values` are the names of plain values, `others` all others in their order, and `needed` the
    names of tensors that are never absent.
    """

    values: tuple[str, ...]
    others: tuple[tuple[str, Kind], ...]
    needed: frozenset[str]


@cache
def layout_of(message: type) -> Layout:
    """Return the layout of a class of messages."""
    kinds = [(each, _KINDS.get(each.type, Kind.VALUE)) for each in traveling(message)]
    return Layout(
        values=tuple(each.name for each, kind in kinds if kind is Kind.VALUE),
        others=tuple((each.name, kind) for each, kind in kinds if kind is not Kind.VALUE),
        needed=frozenset(each.name for each, _ in kinds if each.type is Tensor),
    )
