"""The records that fedsplit adds to Flower's messages, and a client's state between messages."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedsplit import atomic
from fedsplit.client.scaling import INITIAL_SCALE, LossScale
from fedsplit.errors import CheckpointError, ModelMismatch
from fedsplit.flower.npy import tensor_of
from fedsplit.runs.checkpoint import Checkpoint, checkpoints_in, prune
from fedsplit.spec import RunSpec

ARRAYS = "arrays"
"""Key of the client weights in a message: the trained tensors of bottom and top."""
METRICS = "metrics"
"""Key of a reply's metrics."""
WEIGHT = "num-examples"
"""Flower's key of a client's weight; here it counts tokens."""
_HELLO, _JOIN_INFO, _COUNTS = "hello", "fedsplit", "counts"
_KEPT = ("moments", "personal", "history")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The first message to a client: the run that it joins.

    `run_id` is the id that a run keeps when it is resumed. A run that was `resumed` continues
    after that round; a new one has 0 there. `config`, `tokenizer` and `labels` are those of
    `JoinInfo`, so that a client can check its data before the first round.
    """

    run_id: str
    config: str
    tokenizer: str
    labels: tuple[str, ...] = ()
    resumed: int = 0

    @property
    def content(self) -> RecordDict:
        """The content of the message."""
        # Flower's records hold lists, not tuples.
        fields = {**asdict(self), "labels": list(self.labels)}
        return RecordDict({_HELLO: ConfigRecord(fields)})

    @staticmethod
    def of(content: RecordDict) -> "Hello":
        """Read the message's content."""
        fields: dict[str, Any] = dict(content.config_records[_HELLO])
        return Hello(**{**fields, "labels": tuple(fields["labels"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinInfo:
    """The information that a client needs to take part in a round.

    `address` and `token` lead to the trunk, `config` is the run's fingerprint, `tokenizer` a
    tokenizer as JSON (empty for a checkpoint, which has its own), `labels` are the classes of a
    classifier. `run_id` and `resumed` are those of `Hello`.
    """

    client: str
    round: int
    address: str
    token: str
    config: str
    tokenizer: str
    run_id: str
    labels: tuple[str, ...] = ()
    resumed: int = 0

    def put_into(self, content: RecordDict) -> RecordDict:
        """Return a message's content with this information added."""
        # Flower's records hold lists, not tuples.
        fields = {**asdict(self), "labels": list(self.labels)}
        return RecordDict({**content, _JOIN_INFO: ConfigRecord(fields)})

    @staticmethod
    def of(content: RecordDict) -> "JoinInfo":
        """Read the information from a message's content."""
        fields: dict[str, Any] = dict(content.config_records[_JOIN_INFO])
        return JoinInfo(**{**fields, "labels": tuple(fields["labels"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """A client's state from one message to the next, in Flower's `context.state`.

    `steps` and `batches` are the numbers of optimizer steps taken and batches read. `moments` are
    the optimizer's, `personal` the tensors of the personal part, both by name. `history` is the
    state of the wire's codecs (AQ-SGD's activations), and `loss_scale` that of float16.
    """

    steps: int = 0
    batches: int = 0
    moments: dict[str, Tensor] = field(default_factory=dict)
    personal: dict[str, Tensor] = field(default_factory=dict)
    history: dict[str, Tensor] = field(default_factory=dict)
    loss_scale: LossScale = INITIAL_SCALE

    @staticmethod
    def of(state: RecordDict) -> "Memory | None":
        """Return the stored state; None at the client's first message."""
        if _COUNTS not in state:
            return None
        counts: dict[str, Any] = dict(state.metric_records[_COUNTS])
        groups: dict[str, Any] = {
            name: {key: tensor_of(array) for key, array in state.array_records[name].items()}
            for name in _KEPT
        }
        return Memory._of(groups, counts)

    def put_into(self, state: RecordDict) -> None:
        """Store the state, in place of the one before."""
        state[_COUNTS] = MetricRecord(self._counts)
        for name in _KEPT:
            state[name] = to_arrays(getattr(self, name))

    def save(self, parent: Path, round: int, run: RunSpec) -> None:
        """Write a checkpoint from which the run can be resumed after `round`."""
        Checkpoint(
            round=round,
            owner=_owner(parent),
            settings=run.settings,
            facts=self._counts,
            tensors={name: getattr(self, name) for name in _KEPT},
        ).write(parent)
        # The server keeps its last two checkpoints; a resume from either needs the client's.
        every = run.train.save_every
        prune(parent, (round - 1) // every * every - every)

    @staticmethod
    def restore(parent: Path, round: int, run: RunSpec) -> "Memory":
        """Return the client's state at the end of `round`.

        Raises:
            CheckpointError: There is no checkpoint of this round or before, or it is damaged.
        """
        atomic.recover(parent)
        # A client that was not selected in `round` wrote its last checkpoint in an earlier one.
        kept = {number: path for number, path in checkpoints_in(parent).items() if number <= round}
        if not kept:
            raise CheckpointError(
                f"{parent} holds nothing of round {round} or before, so this client cannot resume "
                "the run; start it on the machine with that folder (node config state-dir), or "
                "start a new run without resume"
            )
        checkpoint = Checkpoint.read(kept[max(kept)], run, _owner(parent), _KEPT)
        groups: dict[str, Any] = {name: checkpoint.tensors[name] for name in _KEPT}
        return Memory._of(groups, checkpoint.facts)

    @property
    def _counts(self) -> dict[str, Any]:
        scale = {"loss_scale": self.loss_scale.value, "good_steps": self.loss_scale.good_steps}
        return {"steps": self.steps, "batches": self.batches, **scale}

    @staticmethod
    def _of(groups: dict[str, Any], counts: dict[str, Any]) -> "Memory":
        scale = LossScale(value=counts["loss_scale"], good_steps=counts["good_steps"])
        steps, batches = counts["steps"], counts["batches"]
        return Memory(**groups, steps=steps, batches=batches, loss_scale=scale)


def _owner(parent: Path) -> str:
    """The owner of a client's checkpoints in a folder, which is named after client and run id."""
    return f"{parent.parent.name}/{parent.name}"


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return tensors as a record of Flower; bfloat16 becomes float32, which is exact."""
    # NumPy, and so Flower's arrays, have no bfloat16.
    wide = {torch.bfloat16: torch.float32}
    return ArrayRecord(
        {name: t.detach().to("cpu", wide.get(t.dtype, t.dtype)) for name, t in tensors.items()}
    )


def load_arrays(into: Mapping[str, Tensor], arrays: ArrayRecord) -> None:
    """Copy a record's arrays into tensors of the same names.

    Raises:
        ModelMismatch: The names or shapes differ.
        BadTensor: An array's bytes are not its values.
    """
    state = {name: tensor_of(array) for name, array in arrays.items()}
    if state.keys() != into.keys():
        odd = sorted(state.keys() ^ into.keys())
        raise ModelMismatch(
            f"{len(state)} tensors of client weights arrived, but this model trains {len(into)}; "
            f"the first difference is {odd[0]!r}; start both sides from the same model and config"
        )
    with torch.no_grad():
        for name, tensor in into.items():
            if tensor.shape != state[name].shape:
                raise ModelMismatch(
                    f"{name} arrived with shape {tuple(state[name].shape)}, but has shape "
                    f"{tuple(tensor.shape)} here; start both sides from the same model"
                )
            tensor.copy_(state[name])


def num_bytes(arrays: ArrayRecord) -> int:
    """Return the bytes of a record's arrays in a message."""
    return sum(len(array.data) for array in arrays.values())
