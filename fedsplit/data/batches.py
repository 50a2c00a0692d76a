"""Batches: what a model trains on, as rows of one shape, and the order in which they are served.

Shapes: B sequences of a batch, T tokens of a sequence.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # the label that Hugging Face losses skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """What one call of a model needs, and how much it counts.

    `inputs` are the arguments of the model's forward beside `labels`. Of a language model these
    are `input_ids` and `attention_mask` [B, T], 0 at padding, where `labels` [B, T] are -100; of
    a classifier `labels` [B] are classes. `num_tokens` is how many predictions the loss is the
    mean of (tokens, of a classifier rows): weigh losses by it. `num_bytes` is how many UTF-8
    bytes of text these stand for: `loss * num_tokens / num_bytes / ln 2` is in bits per byte;
    classes stand for none. `examples_B` are the numbers of the client's examples that it is made
    of, the same ones whenever they come up; empty where they have none.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    num_tokens: int
    num_bytes: int
    examples_B: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


def micro_batches(
    batch: Batch, number: int, num_predictions: Callable[[Tensor], int]
) -> list[Batch]:
    """A batch in `number` pieces of as equal sizes as can be, or in as many as it has rows.

    A piece without predictions is left out. How many bytes of text a piece stands for is not
    known here; its `num_bytes` is 0.

    Args:
        batch: The batch.
        number: How many pieces.
        num_predictions: Counts the predictions that labels are for, as `Task.num_predictions`.
    """
    inputs = {name: tensor.tensor_split(number) for name, tensor in batch.inputs.items()}
    examples = batch.examples_B.tensor_split(number)
    pieces = [
        Batch(
            inputs={name: parts[i] for name, parts in inputs.items()},
            labels=labels,
            num_tokens=num_predictions(labels),
            num_bytes=0,
            examples_B=examples[i],
        )
        for i, labels in enumerate(batch.labels.tensor_split(number))
    ]
    return [piece for piece in pieces if piece.num_tokens] if number > 1 else [batch]


class Examples(Protocol):
    """What batches are made of: numbered rows."""

    def __len__(self) -> int:
        """How many rows there are."""

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows with these numbers, in this order."""


def training_batches(
    examples: Examples, *, batch_size: int, num_batches: int, seed: int, start: int
) -> Iterator[Batch]:
    """Batches number `start`, `start + 1`, ... of an endless stream of shuffled epochs.

    The stream depends on the examples, `batch_size` and `seed` alone, so whoever continues it
    needs no state but the number of the next batch. Every batch is full: one that ends an epoch
    is filled up from the next.

    Args:
        examples: What to train on.
        batch_size: Examples per batch.
        num_batches: How many batches to yield.
        seed: Decides the order within each epoch.
        start: Number of the first batch; the stream begins with 0.

    Yields:
        Batches of `batch_size` examples.
    """
    rows = _shuffled_rows(len(examples), seed, start * batch_size)
    for _ in range(num_batches):
        yield examples.batch(list(islice(rows, batch_size)))


def evaluation_batches(examples: Examples, batch_size: int) -> Iterator[Batch]:
    """Every example once, in order; the last batch may be smaller."""
    rows = range(len(examples))
    for start in range(0, len(rows), batch_size):
        yield examples.batch(rows[start : start + batch_size])


def _shuffled_rows(num_rows: int, seed: int, first: int) -> Iterator[int]:
    epoch, skip = divmod(first, num_rows)
    while True:
        yield from np.random.default_rng((seed, epoch)).permutation(num_rows)[skip:].tolist()
        epoch, skip = epoch + 1, 0
