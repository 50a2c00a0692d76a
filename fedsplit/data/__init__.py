"""The data of a run: corpora, their partition among clients, tokenizers, tasks and batches."""

from fedsplit.data.batches import (
    Batch,
    Examples,
    evaluation_batches,
    training_batches,
)
from fedsplit.data.corpora import Corpus, Document, Turn, hold_out, labels_of
from fedsplit.data.encoding import layout_of
from fedsplit.data.sharding import shard, shard_held_out
from fedsplit.data.sources import load_corpus
from fedsplit.data.tasks import TASKS, Task
from fedsplit.data.tasks.causal_lm import Sequences, tokenize
from fedsplit.data.tasks.classification import Labelled
from fedsplit.data.tokenizing import (
    load_tokenizer,
    tokenizer_from_json,
    tokenizer_to_json,
    train_tokenizer,
)

__all__ = [
    "TASKS",
    "Batch",
    "Corpus",
    "Document",
    "Examples",
    "Labelled",
    "Sequences",
    "Task",
    "Turn",
    "evaluation_batches",
    "hold_out",
    "labels_of",
    "layout_of",
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
