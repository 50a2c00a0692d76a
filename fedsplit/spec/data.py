"""The settings of a run's data: its source, and its partition among the clients."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from fedsplit.errors import ConfigError
from fedsplit.spec.checks import AtLeast, OneOf, Positive, Within, check_fields

TASKS = (
    "causal_lm",
    "sequence_classification",
    "image_classification",
)
"""The names of the tasks in `fedsplit.data.tasks`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """The source of the data, and the length of its sequences.

    Attributes:
        kind: The source: texts of Python's documentation (embedded), files (text, jsonl, parquet,
            csv), a directory that save_to_disk of datasets wrote (saved), a data set of the hub
            (hub), or scikit-learn's images of digits (digits).
        path: The file or directory of the data, or its hub id.
        field: The field of a record that has the text or the list of messages.
        label: The field of a record that has the class, if the task has classes.
        split: The split of a data set that has several, such as train or test.
        sequence_length (tokens): The length of a training sequence.
        vocabulary (tokens): The size of the tokenizer that is trained for a model from scratch.
        held_out: The share of the data that is used for evaluation only.
        special_tokens: With auto, a document's tokens are what the tokenizer makes of it by
            default, as in generation: it adds its own special tokens, and reads those that the
            text spells. With none, it adds none and reads all characters as text.
        assistant_only_loss: Whether the loss of a conversation counts the tokens of the role
            assistant only.
    """

    kind: Annotated[
        str, OneOf("embedded", "text", "jsonl", "parquet", "csv", "saved", "hub", "digits")
    ] = "embedded"
    path: str = ""
    field: str = "text"
    label: str = "label"
    split: str = "train"
    # A language model predicts from the second token on. The last sequence is padded to the length,
    # so an absurd one takes all memory before it is found that no data is as long.
    sequence_length: Annotated[int, AtLeast(2, most=1 << 20)] = 128
    # Byte-level BPE has a token for each byte, and there is one special token.
    vocabulary: Annotated[int, AtLeast(257)] = 1024
    held_out: Annotated[float, Within(0.0, 1.0)] = 0.1
    special_tokens: Annotated[str, OneOf("auto", "none")] = "auto"
    assistant_only_loss: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "data")
        if self.kind not in ("embedded", "digits") and not self.path:
            raise ConfigError(
                f"data.path is empty, but data={self.kind} needs one; set data.path=..."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingSpec:
    """The partition of the data among clients.

    Attributes:
        kind: The partition. dirichlet, pathological and shards go by the documents' labels, or by
            their groups if there are no labels.
        alpha: The concentration of dirichlet. A smaller one makes the clients differ more.
        classes (classes): The number of different labels of a client (pathological).
        shards (shards): The number of shards of a client (shards).
        skew: With a skew above 0, client i's share of an iid or shards partition is proportional
            to (i + 1) ** -skew.
        target: The import path of a flwr-datasets partitioner (partitioner).
        options: The arguments of that partitioner.
    """

    kind: Annotated[
        str, OneOf("iid", "natural", "dirichlet", "pathological", "shards", "partitioner")
    ] = "natural"
    # The sum of larger draws is infinite.
    alpha: Annotated[float, Positive(most=1e12)] = 0.5
    classes: Annotated[int, AtLeast(1)] = 2
    shards: Annotated[int, AtLeast(1)] = 2
    # With a larger one, the shares of the last of many clients round to 0.
    skew: Annotated[float, AtLeast(0, most=16)] = 0.0
    target: str = ""
    # A dict has no hash.
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_fields(self, "sharding")
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
