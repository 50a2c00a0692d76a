"""Where data comes from, and which client holds what of it."""

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
    """Where data comes from and how it becomes sequences.

    `path` is a file or directory (text, jsonl) or a hub name (hub); `field` the text's field and
    `label` that of its class, where the task has classes. `sequence_length` and `vocabulary` are
    in tokens; the vocabulary is that of the tokenizer trained for a model made from scratch.
    `held_out` is the share of the data that is never trained on.
    """

    kind: str = "embedded"
    path: str = ""
    field: str = "text"
    label: str = "label"
    split: str = "train"
    sequence_length: int = 128
    vocabulary: int = 1024
    held_out: float = 0.1

    def __post_init__(self) -> None:
        one_of("data", self.kind, ("embedded", "text", "jsonl", "hub", "digits"))
        if self.kind not in ("embedded", "digits") and not self.path:
            raise ConfigError(
                f"data.path is empty, but data={self.kind} needs one; set data.path=..."
            )
        at_least("data.sequence_length", self.sequence_length, 2)
        at_least("data.vocabulary", self.vocabulary, 257)
        within("data.held_out", self.held_out, 0.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingSpec:
    """How the data is dealt out to clients.

    `dirichlet` (with `alpha`), `pathological` (`classes` per client) and `shards` (`shards` per
    client) go by the documents' labels, or by their groups where there are none. With a `skew`
    above 0, client i's share of an iid or shards dealing is proportional to (i + 1) ** -skew.
    `target` is the import path of a flwr-datasets partitioner (kind `partitioner`), `options`
    what it is made with.
    """

    kind: str = "natural"
    alpha: float = 0.5
    classes: int = 2
    shards: int = 2
    skew: float = 0.0
    target: str = ""
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
