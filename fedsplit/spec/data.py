"""The settings of a run's data: its source, and its partition among the clients."""

from dataclasses import dataclass, field
from typing import Any

from fedsplit.errors import ConfigError
from fedsplit.spec.checks import at_least, one_of, positive, within

TASKS = (
    "causal_lm",
    "sequence_classification",
    "image_classification",
)
"""The names of the tasks in `fedsplit.data.tasks`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """The source of the data, and the length of its sequences.

    `path` is a file or directory (text, jsonl, parquet, csv, saved) or a hub id (hub). `field` is
    the record's field with the text or the list of messages, and `label` the one with the class,
    if the task has classes. `sequence_length` and `vocabulary` are in tokens; the vocabulary is
    that of the tokenizer that is trained for a model from scratch. `held_out` is the share of the
    data that is used for evaluation only.

    With `special_tokens=auto`, a document's tokens are what the tokenizer makes of it by default,
    as in generation: it adds its own special tokens, and reads those that the text spells. With
    `none`, it adds none and reads all characters as text. With `assistant_only_loss`, the loss of
    a conversation counts the tokens of the role `assistant` only.
    """

    kind: str = "embedded"
    path: str = ""
    field: str = "text"
    label: str = "label"
    split: str = "train"
    sequence_length: int = 128
    vocabulary: int = 1024
    held_out: float = 0.1
    special_tokens: str = "auto"
    assistant_only_loss: bool = False

    def __post_init__(self) -> None:
        kinds = ("embedded", "text", "jsonl", "parquet", "csv", "saved", "hub", "digits")
        one_of("data", self.kind, kinds)
        one_of("data.special_tokens", self.special_tokens, ("auto", "none"))
        if self.kind not in ("embedded", "digits") and not self.path:
            raise ConfigError(
                f"data.path is empty, but data={self.kind} needs one; set data.path=..."
            )
        # A language model predicts from the second token on.
        at_least("data.sequence_length", self.sequence_length, 2)
        # Byte-level BPE has a token for each byte, and there is one special token.
        at_least("data.vocabulary", self.vocabulary, 257)
        within("data.held_out", self.held_out, 0.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingSpec:
    """The partition of the data among clients.

    `dirichlet` (with `alpha`), `pathological` (`classes` per client) and `shards` (`shards` per
    client) partition by the documents' labels, or by their groups if there are no labels. With a
    `skew` above 0, client i's share of an `iid` or `shards` partition is proportional to
    (i + 1) ** -skew. `target` is the import path of a flwr-datasets partitioner (kind
    `partitioner`), and `options` are its arguments.
    """

    kind: str = "natural"
    alpha: float = 0.5
    classes: int = 2
    shards: int = 2
    skew: float = 0.0
    target: str = ""
    # A dict has no hash.
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        kinds = ("iid", "natural", "dirichlet", "pathological", "shards", "partitioner")
        one_of("sharding", self.kind, kinds)
        positive("sharding.alpha", self.alpha)
        at_least("sharding.classes", self.classes, 1)
        at_least("sharding.shards", self.shards, 1)
        at_least("sharding.skew", self.skew, 0)
        if (self.kind == "partitioner") != bool(self.target):
            raise ConfigError(
                f"sharding={self.kind} with sharding.target={self.target!r}: a target goes with "
                "sharding=partitioner, and that needs one, such as "
                "flwr_datasets.partitioner.LinearPartitioner"
            )
        if self.skew and self.kind not in ("iid", "shards"):
            raise ConfigError(
                f"sharding.skew={self.skew} goes with sharding=iid or shards; sizes of "
                f"sharding={self.kind} come from the data"
            )
