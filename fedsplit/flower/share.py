"""A node's share of the data: its training and held-out examples, and their tokenizer."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice

from transformers import TokenizersBackend

from fedsplit.data import (
    TASKS,
    Batch,
    Corpus,
    Examples,
    evaluation_batches,
    hold_out,
    load_corpus,
    load_tokenizer,
    shard,
    shard_held_out,
    tokenizer_from_json,
    training_batches,
)
from fedsplit.errors import ConfigError
from fedsplit.flower.node import Node
from fedsplit.spec import DataSpec, RunSpec, ShardingSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """The tokenizer and classes that turn documents into tensors, equal at all clients.

    `tokenizer` is JSON; it is empty for a pretrained model, which has its own tokenizer.
    """

    tokenizer: str
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Share:
    """A client's training and held-out examples: one `Examples` for each partition that it has.

    A client has one partition. The node of `baseline=central` has those of all clients.
    """

    run: RunSpec
    training: tuple[Examples, ...]
    held_out: tuple[Examples, ...]

    def __len__(self) -> int:
        """Return the number of training examples."""
        return sum(map(len, self.training))

    def require_full_batches(self, client: str) -> None:
        """Refuse batches that are larger than the training data, since rows would repeat in them.

        Raises:
            ConfigError: `train.batch_size` is larger; the text has both numbers.
        """
        train, smallest = self.run.train, min(map(len, self.training))
        if train.batch_size > smallest:
            raise ConfigError(
                f"{client} has {smallest} training examples, but train.batch_size="
                f"{train.batch_size}; set train.batch_size={smallest} or less, or give the client "
                "more data"
            )
        if train.batch_size * train.accumulation > smallest:
            raise ConfigError(
                f"{client} has {smallest} training examples, but train.accumulation="
                f"{train.accumulation} batches of train.batch_size={train.batch_size} are "
                f"{train.batch_size * train.accumulation}; lower one of them, or give the client "
                "more data"
            )

    def groups(self, start: int, num_steps: int) -> Iterator[Sequence[Batch]]:
        """Yield the batches of each of the next `num_steps` optimizer steps.

        Args:
            start: The number of batches already read from each partition.
            num_steps: The number of optimizer steps.
        """
        train = self.run.train
        streams = [
            training_batches(
                own,
                batch_size=train.batch_size,
                num_batches=num_steps * train.accumulation,
                seed=self.run.seed,
                start=start,
            )
            for own in self.training
        ]
        # A step of `baseline=central` reads from every partition what its client would read.
        for _ in range(num_steps):
            yield [batch for stream in streams for batch in islice(stream, train.accumulation)]

    def evaluation(self) -> Iterator[Batch]:
        """Yield all held-out batches."""
        size = self.run.train.batch_size
        return chain.from_iterable(evaluation_batches(own, size) for own in self.held_out)


def texts_of(run: RunSpec, node: Node) -> tuple[tuple[Corpus, ...], tuple[Corpus, ...]]:
    """Return a node's training and held-out documents, which are read once for all rounds."""
    with _cache_lock:
        if node.data_path:
            # The embedded text has no path, so a path of one's own is read as text files.
            kind = "text" if run.data.kind == "embedded" else run.data.kind
            own = replace(run.data, kind=kind, path=node.data_path)
            training, held_out = own_corpora(own, run.task, run.seed)
            return (training,), (held_out,)
        partitions, held_out_partitions = partitions_of(
            run.data, run.task, run.sharding, run.clients, run.seed
        )
    if run.baseline == "central":
        return partitions, held_out_partitions
    return (partitions[node.partition],), (held_out_partitions[node.partition],)


def share_of(run: RunSpec, node: Node, preparation: Preparation) -> Share:
    """Return a node's examples, which are made once for all rounds."""
    prepared = _prepared_of(run, preparation)
    if node not in prepared.shares:
        training, held_out = (
            tuple(
                TASKS[run.task].examples(c, run.data, prepared.tokenizer, preparation.labels)
                for c in corpora
            )
            for corpora in texts_of(run, node)
        )
        prepared.shares[node] = Share(run=run, training=training, held_out=held_out)
    return prepared.shares[node]


def tokenizer_of(run: RunSpec, preparation: Preparation) -> TokenizersBackend | None:
    """Return the run's tokenizer; None for images."""
    return _prepared_of(run, preparation).tokenizer


# --- caches that last from message to message -------------------------------------------------
#
# The caches hold one run: a process that simulates all clients keeps one corpus and its examples,
# however many clients there are, and nothing of the run before.

_cache_lock = threading.Lock()
"""Held while a cache is read: `lru_cache` lets each thread compute a missing entry."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Prepared:
    """The tokenizer of a run, and the examples of the nodes in this process."""

    tokenizer: TokenizersBackend | None
    shares: dict[Node, Share]


@lru_cache(maxsize=1)
def partitions_of(
    data: DataSpec, task: str, sharding: ShardingSpec, clients: int, seed: int
) -> tuple[tuple[Corpus, ...], tuple[Corpus, ...]]:
    """Return the training shards and the held-out shards of all clients."""
    whole, rest = hold_out(load_corpus(data, task), data.held_out, seed)
    # The training corpus first: an error about it says more to the user.
    training = shard(whole, sharding, clients, seed)
    return training, shard_held_out(rest, sharding, clients, seed)


@lru_cache(maxsize=1)
def own_corpora(data: DataSpec, task: str, seed: int) -> tuple[Corpus, Corpus]:
    """Return the training and held-out part of a corpus that one client alone has."""
    return hold_out(load_corpus(data, task), data.held_out, seed)


def _prepared_of(run: RunSpec, preparation: Preparation) -> _Prepared:
    with _cache_lock:
        return _prepare(run, preparation)


@lru_cache(maxsize=1)
def _prepare(run: RunSpec, preparation: Preparation) -> _Prepared:
    if not TASKS[run.task].reads_text:
        return _Prepared(tokenizer=None, shares={})
    if run.model.pretrained:
        tokenizer = load_tokenizer(run.model.pretrained, run.model.revision)
    else:
        tokenizer = tokenizer_from_json(preparation.tokenizer)
    return _Prepared(tokenizer=tokenizer, shares={})
