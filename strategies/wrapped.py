"""What a wrapped Flower strategy remembers from round to round, as tensors by name.

FedAdam has moments, FedAvgM a momentum; Flower keeps them in plain attributes. A name here is
`attribute:kind:place:key`, where kind says what the attribute holds: a `dict` or a `list` of NumPy
arrays, Flower's `arrays`, or a single `number`. The place keeps the order, on which some of
Flower's sums depend. A strategy that itself wraps another one has that one's names below its own.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor

from fedsplit.errors import CheckpointError

_WITHIN = "/"


def averages(strategy: Strategy) -> bool:
    """Whether a strategy does nothing to halves but average them."""
    return getattr(type(strategy), "aggregate_train", None) is FedAvg.aggregate_train


def memory_of(strategy: Strategy) -> dict[str, Tensor]:
    """Copies of all that the strategy remembers."""
    found: dict[str, Tensor] = {}
    for attribute, value in vars(strategy).items():
        if isinstance(value, Strategy):
            inner = memory_of(value)
            found |= {f"{attribute}{_WITHIN}{name}": tensor for name, tensor in inner.items()}
        else:
            for kind, place, key, array in _pieces(value):
                name = f"{attribute}:{kind}:{place}:{key}"
                found[name] = torch.from_numpy(np.array(array))
    return found


def remember(strategy: Strategy, memory: Mapping[str, Tensor]) -> None:
    """Give a strategy back what `memory_of` found in one of its kind.

    Raises:
        CheckpointError: The memory is another strategy's.
    """
    pieces: dict[tuple[str, str], list[tuple[int, str, np.ndarray]]] = {}
    inner: dict[str, dict[str, Tensor]] = {}
    for name, tensor in memory.items():
        before, within, rest = name.partition(_WITHIN)
        if within and ":" not in before:
            inner.setdefault(before, {})[rest] = tensor
            continue
        attribute, kind, place, key = name.split(":", 3)
        array = tensor.numpy().copy()
        pieces.setdefault((attribute, kind), []).append((int(place), key, array))
    for (attribute, kind), entries in pieces.items():
        _require(strategy, attribute)
        entries.sort(key=lambda entry: entry[0])
        setattr(strategy, attribute, _assembled(kind, entries))
    for attribute, told in inner.items():
        _require(strategy, attribute)
        remember(getattr(strategy, attribute), told)


def _require(strategy: Strategy, attribute: str) -> None:
    if attribute not in vars(strategy):
        raise CheckpointError(
            f"the checkpoint has a strategy with {attribute!r}, which {type(strategy).__name__} "
            "does not have; resume with the same halves.strategy and version of Flower"
        )


def _pieces(value: object) -> Iterator[tuple[str, int, str, Any]]:
    if isinstance(value, ArrayRecord):
        arrays = {name: array.numpy() for name, array in value.items()}
        yield from _numbered("arrays", arrays.items())
    elif isinstance(value, dict) and _all_arrays(value.values()):
        yield from _numbered("dict", value.items())
    elif isinstance(value, list) and _all_arrays(value):
        yield from _numbered("list", (("", array) for array in value))
    elif isinstance(value, float):
        yield "number", 0, "", np.float64(value)


def _all_arrays(values: Iterable[object]) -> bool:
    return all(isinstance(value, np.ndarray | np.generic) for value in values)


def _numbered(kind: str, entries: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, int, str, Any]]:
    for place, (key, array) in enumerate(entries):
        yield kind, place, key, array


def _assembled(kind: str, entries: list[tuple[int, str, np.ndarray]]) -> object:
    if kind == "arrays":
        return ArrayRecord({key: Array(array) for _, key, array in entries})
    if kind == "dict":
        return {key: array for _, key, array in entries}
    if kind == "list":
        return [array for _, _, array in entries]
    return float(entries[0][2])
