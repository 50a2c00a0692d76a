"""Text for a federation: corpora, their shards, tokenizers, and batches of tokens."""

from fedsplit.data.batches import Batch, Sequences, evaluation_batches, training_batches
from fedsplit.data.corpora import Corpus, Document, hold_out, load_corpus
from fedsplit.data.sharding import shard, shard_held_out
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
    "Sequences",
    "evaluation_batches",
    "hold_out",
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
