"""Halves into halves: what a discount does to a reply, and how `async` mixes replies in."""

from collections.abc import Sequence
from copy import copy

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from fedsplit.flower.records import METRICS, WEIGHT


def discounted(reply: Message, discount: float) -> Message:
    """A reply whose weight in any of Flower's averages is `discount` times what it was."""
    if discount == 1.0:
        return reply
    metrics = dict(reply.content.metric_records[METRICS])
    metrics[WEIGHT] = metrics[WEIGHT] * discount  # type: ignore[operator]
    lighter = copy(reply)
    lighter.content = RecordDict({**reply.content, METRICS: MetricRecord(metrics)})
    return lighter


def mixed(
    current: ArrayRecord, changes: Sequence[tuple[ArrayRecord, ArrayRecord, float]]
) -> ArrayRecord:
    """FedAsync (arXiv 1903.03934, algorithm 1): `(1 - rate) * current + rate * came`.

    Args:
        current: The halves now.
        changes: For each reply the halves that its client began with, those that came back, and
            its rate.
    """
    for _, came, rate in changes:
        news = {
            name: (1 - rate) * array.numpy() + rate * came[name].numpy()
            for name, array in current.items()
        }
        current = _new(news, current)
    return current


def moved(
    current: ArrayRecord, changes: Sequence[tuple[ArrayRecord, ArrayRecord, float]]
) -> ArrayRecord:
    """FedBuff (arXiv 2106.06639, algorithm 1): `current + mean of rate * (came - began)`.

    Args:
        current: The halves now.
        changes: As `mixed` takes them.
    """
    sums = {name: array.numpy().copy() for name, array in current.items()}
    for began, came, rate in changes:
        for name, total in sums.items():
            total += rate / len(changes) * (came[name].numpy() - began[name].numpy())
    return _new(sums, current)


def in_types_of(arrays: ArrayRecord, like: ArrayRecord) -> ArrayRecord:
    """The arrays in the types that they had before; some of Flower's strategies widen them."""
    return _new({name: array.numpy() for name, array in arrays.items()}, like)


def _new(arrays: dict[str, np.ndarray], like: ArrayRecord) -> ArrayRecord:
    kinds = {name: array.dtype for name, array in like.items()}
    return ArrayRecord({n: Array(np.asarray(array, kinds[n])) for n, array in arrays.items()})
