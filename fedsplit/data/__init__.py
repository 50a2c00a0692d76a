"""Data for a federation: corpora, their shards, tokenizers, and batches of examples."""

from fedsplit.data.batches import (
    Batch,
    Examples,
    Labelled,
    Sequences,
    evaluation_batches,
    training_batches,
)
from fedsplit.data.corpora import Corpus, Document, hold_out, labels_of
from fedsplit.data.sharding import shard, shard_held_out
from fedsplit.data.sources import load_corpus
from fedsplit.data.tasks import examples
from fedsplit.data.tokenizing import (
    load_tokenizer,
    tokenize,
    tokenizer_from_json,
    tokenizer_to_json,
    train_tokenizer,
)

__all__ = [
    "Batch",
    "Corpus",
    "Document",
    "Examples",
    "Labelled",
    "Sequences",
    "evaluation_batches",
    "examples",
    "hold_out",
    "labels_of",
    "load_corpus",
    "load_tokenizer",
    "shard",
    "shard_held_out",
    "tokenize",
    "tokenizer_from_json",
    "tokenizer_to_json",
    "train_tokenizer",
    "training_batches",
]
