"""Batches: the rows of one call of a model, and the order in which training uses them.

Shapes: B sequences of a batch, T tokens of a sequence.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedsplit.errors import DataError

# The label that the losses of Hugging Face skip.
IGNORED = -100


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """The arguments of one call of a model, and the weight of its loss.

    Attributes:
        inputs: The arguments of the model's forward except `labels`. For a language model these
            are `input_ids` and `attention_mask` [B, T], which is 0 at padding.
        labels: [B, T] for a language model, -100 at padding; classes [B] for a classifier.
        num_tokens: Number of predictions that the loss is the mean of (rows for a classifier);
            the weight of the loss.
        num_bytes: Number of UTF-8 bytes of text that are predicted; 0 for classes. The loss in
            bits per byte is `loss * num_tokens / num_bytes / ln 2`.
        examples_B: The rows' numbers in the client's data, the same in every epoch; empty if the
            rows have no numbers.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    num_tokens: int
    num_bytes: int
    examples_B: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


def micro_batches(
    batch: Batch, number: int, num_predictions: Callable[[Tensor], int]
) -> list[Batch]:
    """Cut a batch into `number` pieces of nearly equal size, at most one per row.

    A piece without predictions is left out. The bytes of a piece are not known here, so its
    `num_bytes` is 0.

    Args:
        batch: The batch.
        number: Number of pieces.
        num_predictions: Returns the number of predictions of labels; `Task.num_predictions`.
    """
    # Of more pieces, the others would be empty.
    sections = min(number, len(batch.labels))
    inputs = {name: tensor.tensor_split(sections) for name, tensor in batch.inputs.items()}
    examples = batch.examples_B.tensor_split(sections)
    pieces = [
        Batch(
            inputs={name: parts[i] for name, parts in inputs.items()},
            labels=labels,
            num_tokens=num_predictions(labels),
            num_bytes=0,
            examples_B=examples[i],
        )
        for i, labels in enumerate(batch.labels.tensor_split(sections))
    ]
    # The mean loss of a piece without predictions would be NaN.
    return [piece for piece in pieces if piece.num_tokens] if number > 1 else [batch]


class Examples(Protocol):
    """A client's examples: numbered rows that batches are made of."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def batch(self, rows: Sequence[int]) -> Batch:
        """Return the rows with these numbers, in this order."""


def training_batches(
    examples: Examples, *, batch_size: int, num_batches: int, seed: int, start: int
) -> Iterator[Batch]:
    """Yield batches `start`, `start + 1`, ... of an endless stream of shuffled epochs.

    The stream depends only on the examples, `batch_size` and `seed`, so the number of the next
    batch is all the state that is needed to continue it. Every batch is full: the last batch of an
    epoch is filled with rows of the next epoch.

    Args:
        examples: The examples to train on.
        batch_size: Examples per batch.
        num_batches: Number of batches to yield.
        seed: Decides the order within each epoch.
        start: Number of the first batch to yield; the stream begins with 0.

    Yields:
        Batches of `batch_size` examples.
    """
    rows = _shuffled_rows(len(examples), seed, start * batch_size)
    for _ in range(num_batches):
        yield examples.batch(list(islice(rows, batch_size)))


def evaluation_batches(examples: Examples, batch_size: int) -> Iterator[Batch]:
    """Yield every example once, in order; the last batch may be smaller."""
    rows = range(len(examples))
    for start in range(0, len(rows), batch_size):
        yield examples.batch(rows[start : start + batch_size])


def whole_rows(examples: Examples, name: str, number: int, tokens: int) -> Tensor:
    """Return the token ids of the first rows without padding, cut to some tokens.

    Args:
        examples: The rows of a text.
        name: Its name, for the error.
        number: The most rows.
        tokens: The length to which each is cut.

    Raises:
        DataError: No row is as long.
    """
    found: list[Tensor] = []
    for batch in evaluation_batches(examples, 1):
        if batch.inputs["attention_mask"].all() and batch.inputs["input_ids"].shape[1] >= tokens:
            found.append(batch.inputs["input_ids"][:, :tokens])
        if len(found) == number:
            break
    if not found:
        raise DataError(f"{name} has no text of {tokens} tokens; give a longer one, or take fewer")
    return torch.cat(found)


def _shuffled_rows(num_rows: int, seed: int, first: int) -> Iterator[int]:
    epoch, skip = divmod(first, num_rows)
    while True:
        # Each epoch has a generator of its own, so a resumed run skips epochs without drawing them.
        yield from np.random.default_rng((seed, epoch)).permutation(num_rows)[skip:].tolist()
        epoch, skip = epoch + 1, 0
