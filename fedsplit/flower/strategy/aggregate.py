"""Arithmetic on client weights: staleness discounts, and the rules of FedAsync and FedBuff."""

from collections.abc import Sequence
from copy import copy

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from fedsplit.flower.npy import values_of
from fedsplit.flower.records import METRICS, WEIGHT


def with_discount(reply: Message, discount: float) -> Message:
    """Return a reply whose weight in any of Flower's averages is multiplied by `discount`."""
    if discount == 1.0:
        return reply
    weight = reply.content.metric_records[METRICS][WEIGHT]
    return with_weight(reply, weight * discount)  # type: ignore[operator]


def with_weight(reply: Message, weight: float) -> Message:
    """Return a reply that has this weight in any of Flower's averages."""
    metrics = {**reply.content.metric_records[METRICS], WEIGHT: weight}
    # A copy: the reply's own metrics, which go into the round's record, stay as they are.
    weighted = copy(reply)
    weighted.content = RecordDict({**reply.content, METRICS: MetricRecord(metrics)})
    return weighted


def fedasync(
    current: ArrayRecord, changes: Sequence[tuple[ArrayRecord, ArrayRecord, float]]
) -> ArrayRecord:
    """FedAsync (arXiv 1903.03934, algorithm 1): `(1 - rate) * current + rate * returned`.

    Args:
        current: The current client weights.
        changes: For each reply the weights that its client started from, the weights that it
            returned, and its rate.
    """
    # One after the other, in the given order: each rate applies to the weights so far.
    for _, returned, rate in changes:
        new = {
            name: (1 - rate) * values_of(array) + rate * values_of(returned[name])
            for name, array in current.items()
        }
        current = _record(new, current)
    return current


def fedbuff(
    current: ArrayRecord, changes: Sequence[tuple[ArrayRecord, ArrayRecord, float]]
) -> ArrayRecord:
    """FedBuff (arXiv 2106.06639, algorithm 1): `current + mean of rate * (returned - started)`.

    Args:
        current: The current client weights.
        changes: As in `fedasync`.
    """
    sums = {name: values_of(array) for name, array in current.items()}
    for started, returned, rate in changes:
        for name, total in sums.items():
            total += rate / len(changes) * (values_of(returned[name]) - values_of(started[name]))
    return _record(sums, current)


def with_dtypes_of(arrays: ArrayRecord, like: ArrayRecord) -> ArrayRecord:
    """Return the arrays in the dtypes of `like`; some of Flower's strategies widen them."""
    return _record({name: values_of(array) for name, array in arrays.items()}, like)


def _record(arrays: dict[str, np.ndarray], like: ArrayRecord) -> ArrayRecord:
    dtypes = {name: array.dtype for name, array in like.items()}
    return ArrayRecord({n: Array(np.asarray(array, dtypes[n])) for n, array in arrays.items()})
