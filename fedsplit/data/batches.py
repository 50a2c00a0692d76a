"""Batches: tokenized text as sequences of one length, and the order in which they are served.

Shapes: N sequences, B sequences of a batch, T tokens of a sequence, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # the label that Hugging Face losses skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """What one call of a causal language model needs, all int64, and how much it counts.

    `attention_mask_BT` is 0 and `labels_BT` is -100 at padding. `num_tokens` is how many tokens
    the shifted loss is the mean of (`labels_BT[:, 1:] != -100`); weigh losses by it.
    `num_bytes` is how many UTF-8 bytes of text these tokens stand for:
    `loss * num_tokens / num_bytes / ln 2` is in bits per byte.
    """

    ids_BT: Tensor
    attention_mask_BT: Tensor
    labels_BT: Tensor
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sequences:
    """Sequences of T tokens; all are full but the last, which holds at least two.

    `ids_NT` is padded behind the first `lengths_N` tokens, `bytes_V` is how many UTF-8 bytes of
    text each token of the vocabulary stands for. All are int64.
    """

    ids_NT: Tensor
    lengths_N: Tensor
    bytes_V: Tensor

    def __len__(self) -> int:
        """How many sequences there are."""
        return len(self.ids_NT)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The sequences with these numbers, in this order."""
        index_B = torch.tensor(rows)
        ids_BT, lengths_B = self.ids_NT[index_B], self.lengths_N[index_B]
        is_real_BT = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
        counted = ids_BT[:, 1:][is_real_BT[:, 1:]]
        return Batch(
            ids_BT=ids_BT,
            attention_mask_BT=is_real_BT.long(),
            labels_BT=ids_BT.masked_fill(~is_real_BT, IGNORED),
            num_tokens=counted.numel(),
            num_bytes=int(self.bytes_V[counted].sum()),
        )


def training_batches(
    sequences: Sequences, *, batch_size: int, num_batches: int, seed: int, start: int
) -> Iterator[Batch]:
    """Batches number `start`, `start + 1`, ... of an endless stream of shuffled epochs.

    The stream depends on the sequences, `batch_size` and `seed` alone, so whoever continues it
    needs no state but the number of the next batch. Every batch is full: one that ends an epoch
    is filled up from the next.

    Args:
        sequences: What to train on.
        batch_size: Sequences per batch.
        num_batches: How many batches to yield.
        seed: Decides the order within each epoch.
        start: Number of the first batch; the stream begins with 0.

    Yields:
        Batches of `batch_size` sequences.
    """
    rows = _shuffled_rows(len(sequences), seed, start * batch_size)
    for _ in range(num_batches):
        yield sequences.batch(list(islice(rows, batch_size)))


def evaluation_batches(sequences: Sequences, batch_size: int) -> Iterator[Batch]:
    """Every sequence once, in order; the last batch may be smaller."""
    rows = range(len(sequences))
    for start in range(0, len(rows), batch_size):
        yield sequences.batch(rows[start : start + batch_size])


def _shuffled_rows(num_rows: int, seed: int, first: int) -> Iterator[int]:
    epoch, skip = divmod(first, num_rows)
    while True:
        yield from np.random.default_rng((seed, epoch)).permutation(num_rows)[skip:].tolist()
        epoch, skip = epoch + 1, 0
