"""The state that a Flower strategy keeps from round to round, as tensors by name.

FedAdam has moments, FedAvgM a momentum; Flower keeps them in plain attributes. A name here is
`attribute:kind:place:key`, where kind is the type of the attribute: a `dict` or a `list` of NumPy
arrays, Flower's `arrays`, a single `number`, or `none`. The place keeps the order, on which some of
Flower's sums depend. The state of a strategy inside a strategy is below that attribute's name.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor

from fedsplit.errors import CheckpointError
from fedsplit.flower.npy import values_of

T = TypeVar("T")

_WITHIN = "/"
"""Separates an attribute that is a strategy from the names of its own state."""


def only_averages(strategy: Strategy) -> bool:
    """Return whether a strategy's aggregation is the weighted average of FedAvg."""
    return getattr(type(strategy), "aggregate_train", None) is FedAvg.aggregate_train


def state_of(strategy: Strategy) -> dict[str, Tensor]:
    """Return copies of all tensors that a strategy keeps."""
    found: dict[str, Tensor] = {}
    for attribute, value in vars(strategy).items():
        if isinstance(value, Strategy):
            inner = state_of(value)
            found |= {f"{attribute}{_WITHIN}{name}": tensor for name, tensor in inner.items()}
        else:
            for kind, place, key, array in _entries(value):
                name = f"{attribute}:{kind}:{place}:{key}"
                # A copy: the strategy changes its arrays in place in the next round.
                found[name] = torch.from_numpy(np.array(array))
    return found


def load_state_into(strategy: Strategy, state: Mapping[str, Tensor]) -> None:
    """Load into a strategy what `state_of` returned for one of the same class.

    Raises:
        CheckpointError: The state is another strategy's.
    """
    entries: dict[tuple[str, str], list[tuple[int, str, np.ndarray]]] = {}
    inner: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        before, within, rest = name.partition(_WITHIN)
        # A key after the third colon may contain the separator too, so look before the colon.
        if within and ":" not in before:
            inner.setdefault(before, {})[rest] = tensor
            continue
        attribute, kind, place, key = name.split(":", 3)
        array = tensor.numpy().copy()
        entries.setdefault((attribute, kind), []).append((int(place), key, array))
    for (attribute, kind), found in entries.items():
        _require(strategy, attribute)
        found.sort(key=lambda entry: entry[0])
        setattr(strategy, attribute, _value_of(kind, found))
    for attribute, inner_state in inner.items():
        _require(strategy, attribute)
        load_state_into(getattr(strategy, attribute), inner_state)


def under(prefix: str, state: Mapping[str, T]) -> dict[str, T]:
    """Return the entries whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _require(strategy: Strategy, attribute: str) -> None:
    if attribute not in vars(strategy):
        raise CheckpointError(
            f"the checkpoint has a strategy with {attribute!r}, which {type(strategy).__name__} "
            "does not have; resume with the same client_weights.strategy and version of Flower"
        )


def _entries(value: object) -> Iterator[tuple[str, int, str, Any]]:
    if isinstance(value, ArrayRecord):
        arrays = {name: values_of(array) for name, array in value.items()}
        yield from _numbered("arrays", arrays.items())
    elif isinstance(value, dict) and _all_arrays(value.values()):
        yield from _numbered("dict", value.items())
    elif isinstance(value, list) and _all_arrays(value):
        yield from _numbered("list", (("", array) for array in value))
    elif isinstance(value, float):
        yield "number", 0, "", np.float64(value)
    elif value is None:
        # A strategy that goes back to its first round must lose the moments that it has now.
        yield "none", 0, "", np.empty(0)


def _all_arrays(values: Iterable[object]) -> bool:
    return all(isinstance(value, np.ndarray | np.generic) for value in values)


def _numbered(kind: str, entries: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, int, str, Any]]:
    for place, (key, array) in enumerate(entries):
        yield kind, place, key, array


def _value_of(kind: str, entries: list[tuple[int, str, np.ndarray]]) -> object:
    if kind == "arrays":
        return ArrayRecord({key: Array(array) for _, key, array in entries})
    if kind == "dict":
        return {key: array for _, key, array in entries}
    if kind == "list":
        return [array for _, _, array in entries]
    if kind == "none":
        return None
    return float(entries[0][2])
