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
from fedsplit.errors import CheckpointError, ModelMismatch, ProtocolError, peer_text
from fedsplit.flower.npy import tensor_of
from fedsplit.runs.checkpoint import Checkpoint, checkpoints_in, facts_of, prune, remove_after
from fedsplit.runs.history import History
from fedsplit.spec import RunSpec

ARRAYS = "arrays"
"""Key of the client weights in a message: the trained tensors of bottom and top."""
METRICS = "metrics"
"""Key of a reply's metrics."""
WEIGHT = "num-examples"
"""Flower's key of a client's weight; here it counts tokens."""
_HELLO, _JOIN_INFO, _COUNTS = "hello", "fedsplit", "counts"
_KEPT = ("moments", "personal", "history")
_NEW = History()
_MOST_SAVES = 10
"""The most saves of a server from which a client can continue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The first message to a client: the run that it joins.

    `run_id` is the id that a run keeps when it is resumed. `config`, `tokenizer`, `labels` and
    `history` are those of `JoinInfo`, so that a client can check its data and its checkpoints
    before the first round.
    """

    run_id: str
    config: str
    tokenizer: str
    labels: tuple[str, ...] = ()
    history: History = _NEW

    @property
    def content(self) -> RecordDict:
        """The content of the message."""
        return RecordDict({_HELLO: _record_of(self)})

    @staticmethod
    def of(content: RecordDict) -> "Hello":
        """Read the message's content."""
        return Hello(**_fields_of(content.config_records[_HELLO]))


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinInfo:
    """The information that a client needs to take part in a round.

    `address` and `token` lead to the trunk, `config` is the run's fingerprint, `tokenizer` a
    tokenizer as JSON (empty for a checkpoint, which has its own), `labels` are the classes of a
    classifier. `run_id` is that of `Hello`. `history` says which state of the client is valid,
    `oldest` is the oldest round that the run may go back to, and `lr_scale` the factor on the
    learning rate, at most 1.

    Raises:
        ProtocolError: The factor is not above 0 and at most 1.
    """

    client: str
    round: int
    address: str
    token: str
    config: str
    tokenizer: str
    run_id: str
    labels: tuple[str, ...] = ()
    history: History = _NEW
    lr_scale: float = 1.0
    oldest: int = 0

    def __post_init__(self) -> None:
        # NaN fails this comparison too.
        if not (isinstance(self.lr_scale, float) and 0 < self.lr_scale <= 1):
            raise ProtocolError(
                f"the server scales the learning rate by {self.lr_scale}, which must be above 0 "
                "and at most 1; run the same code at both sides"
            )

    def put_into(self, content: RecordDict) -> RecordDict:
        """Return a message's content with this information added."""
        return RecordDict({**content, _JOIN_INFO: _record_of(self)})

    @staticmethod
    def of(content: RecordDict) -> "JoinInfo":
        """Read the information from a message's content."""
        return JoinInfo(**_fields_of(content.config_records[_JOIN_INFO]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """A client's state from one message to the next, in Flower's `context.state`.

    `steps` and `batches` are the numbers of optimizer steps taken and batches read. `moments` are
    the optimizer's, `personal` the tensors of the personal part, both by name. `history` is the
    state of the wire's codecs (AQ-SGD's activations), and `loss_scale` that of float16. `branch` is
    the branch of the run's `History` that the state belongs to.
    """

    steps: int = 0
    batches: int = 0
    moments: dict[str, Tensor] = field(default_factory=dict)
    personal: dict[str, Tensor] = field(default_factory=dict)
    history: dict[str, Tensor] = field(default_factory=dict)
    loss_scale: LossScale = INITIAL_SCALE
    branch: int = 0

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

    def save(self, parent: Path, round: int, run: RunSpec, oldest: int = 0) -> None:
        """Write a checkpoint from which the run can be resumed after `round`.

        Args:
            parent: The folder of the client's checkpoints.
            round: The round.
            run: The run.
            oldest: The oldest round that the run may go back to; those before it are removed.
        """
        Checkpoint(
            round=round,
            owner=_owner(parent),
            settings=run.settings,
            facts=self._counts,
            tensors={name: getattr(self, name) for name in _KEPT},
        ).write(parent)
        # A server that never saves must not fill the disk.
        prune(parent, max(oldest, round - _MOST_SAVES * run.train.save_every))

    @staticmethod
    def restore(parent: Path, history: History, run: RunSpec) -> "Memory":
        """Return the client's last state that belongs to a history, now of its present branch.

        The checkpoints after it, which belong to no branch of the history, are removed.

        Raises:
            CheckpointError: There is no such checkpoint, or it is damaged.
        """
        atomic.recover(parent)
        for number, path in reversed(checkpoints_in(parent).items()):
            facts = facts_of(path, _KEPT)
            if number > history.last_round_of(facts["branch"]):
                continue
            checkpoint = Checkpoint.read(path, run, _owner(parent), _KEPT)
            groups: dict[str, Any] = {name: checkpoint.tensors[name] for name in _KEPT}
            remove_after(parent, number)
            return Memory._of(groups, {**checkpoint.facts, "branch": history.branch})
        raise CheckpointError(
            f"{parent} holds nothing of round {min(history.rounds, default=0)} or before, so this "
            "client cannot continue the run; start it on the machine with that folder (node config "
            "state-dir), or start a new run without resume"
        )

    @property
    def _counts(self) -> dict[str, Any]:
        scale = {"loss_scale": self.loss_scale.value, "good_steps": self.loss_scale.good_steps}
        return {"steps": self.steps, "batches": self.batches, "branch": self.branch, **scale}

    @staticmethod
    def _of(groups: dict[str, Any], counts: dict[str, Any]) -> "Memory":
        scale = LossScale(value=counts["loss_scale"], good_steps=counts["good_steps"])
        kept = {name: counts[name] for name in ("steps", "batches", "branch")}
        return Memory(**groups, **kept, loss_scale=scale)


def _record_of(info: Hello | JoinInfo) -> ConfigRecord:
    fields = asdict(info)
    fields |= fields.pop("history")
    # Flower's records hold lists, not tuples.
    return ConfigRecord({k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()})


def _fields_of(record: ConfigRecord) -> dict[str, Any]:
    fields: dict[str, Any] = dict(record)
    lists = {name: fields.pop(name, None) for name in ("labels", "branches", "rounds")}
    if odd := [name for name, value in lists.items() if not isinstance(value, list)]:
        raise ProtocolError(
            f"the server sent {peer_text(repr(lists[odd[0]]))} as {odd[0]}, which must be a list; "
            "run the same code at both sides"
        )
    history = History(branches=tuple(lists["branches"]), rounds=tuple(lists["rounds"]))
    return {**fields, "labels": tuple(lists["labels"]), "history": history}


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
