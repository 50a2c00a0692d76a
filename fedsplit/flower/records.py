"""The records that fedsplit adds to Flower's messages, and a client's state between messages."""

import logging
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedsplit import atomic
from fedsplit.client.scaling import INITIAL_SCALE, LossScale
from fedsplit.errors import CheckpointError, ModelMismatch, ProtocolError, peer_text
from fedsplit.flower.npy import tensor_of
from fedsplit.runs.checkpoint import Checkpoint, prune_states, states_in
from fedsplit.spec import RunSpec

log = logging.getLogger(__name__)

ARRAYS = "arrays"
"""Key of the client weights in a message: the trained tensors of bottom and top."""
METRICS = "metrics"
"""Key of a reply's metrics."""
WEIGHT = "num-examples"
"""Flower's key of a client's weight; here it counts tokens."""
TOLD_NOTHING = dict.fromkeys(("row-epsilon", "sequence-epsilon", "bits", "label-bits"), 0.0)
"""The numbers of a reply that say what noisy rows have told; of a client without noise."""
_HELLO, _JOIN_INFO, _COUNTS = "hello", "fedsplit", "counts"
_LISTS = ("labels", "kept_states", "other_addresses")
_KEPT = ("moments", "personal", "history")


def new_state_id() -> int:
    """Return a random id for the state of a client; no other state of any run has it."""
    # Random, so that a server that was killed cannot give two states one id. 62 bits fit the
    # signed 64-bit fields of Flower. Not 0, which stands for the state before any work.
    return secrets.randbits(62) | 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The first message to a client: the run that it joins.

    `run_id` is the id that a run keeps when it is resumed. `config`, `tokenizer` and `labels` are
    those of `JoinInfo`, so that a client can check its data before the first round.
    """

    run_id: str
    config: str
    tokenizer: str
    labels: tuple[str, ...] = ()

    @property
    def content(self) -> RecordDict:
        """The content of the message."""
        return RecordDict({_HELLO: _record_of(self)})

    @staticmethod
    def of(content: RecordDict) -> "Hello":
        """Read the message's content.

        Raises:
            ProtocolError: It is not that of such a message.
        """
        return Hello(**_fields_of(content, _HELLO, Hello))


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinInfo:
    """The information that a client needs to take part in a round.

    `address` and `token` lead to the trunk; the client goes to the first of `other_addresses` whose
    server is there if its own is gone. `config` is the run's fingerprint, `tokenizer` a
    tokenizer as JSON (empty for a checkpoint, which has its own), `labels` are the classes of a
    classifier. `run_id` is that of `Hello`. `state` is the id of the client's state to begin with
    (0: the state before any work), and `next_state` the id of its state after this work (0: it
    does not change). `kept_states` are those that the run may go back to. `lr_scale` is the factor
    on the learning rate, at most 1.

    Raises:
        ProtocolError: The factor is not above 0 and at most 1, or an id is impossible.
    """

    client: str
    round: int
    address: str
    token: str
    config: str
    tokenizer: str
    run_id: str
    labels: tuple[str, ...] = ()
    state: int = 0
    next_state: int = 0
    kept_states: tuple[int, ...] = ()
    other_addresses: tuple[str, ...] = ()
    lr_scale: float = 1.0

    def __post_init__(self) -> None:
        # NaN fails this comparison too.
        if not (isinstance(self.lr_scale, float) and 0 < self.lr_scale <= 1):
            raise ProtocolError(
                f"the server scales the learning rate by {self.lr_scale}, which must be above 0 "
                "and at most 1; run the same code at both sides"
            )
        ids = (self.state, self.next_state, *self.kept_states)
        if not all(isinstance(each, int) and 0 <= each < 2**63 for each in ids):
            raise ProtocolError(
                f"the server sent {peer_text(repr(ids))} as ids of states, which must be whole "
                "numbers from 0 on; run the same code at both sides"
            )

    def put_into(self, content: RecordDict) -> RecordDict:
        """Return a message's content with this information added."""
        return RecordDict({**content, _JOIN_INFO: _record_of(self)})

    @staticmethod
    def of(content: RecordDict) -> "JoinInfo":
        """Read the information from a message's content.

        Raises:
            ProtocolError: It is not there, or is impossible.
        """
        return JoinInfo(**_fields_of(content, _JOIN_INFO, JoinInfo))


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """A client's state from one message to the next, in Flower's `context.state`.

    `steps` and `batches` are the numbers of optimizer steps taken and batches read. `moments` are
    the optimizer's, `personal` the tensors of the personal part, both by name. `history` is the
    state of the wire's codecs (AQ-SGD's activations), and `loss_scale` that of float16. `id` is the
    `next_state` of the work that made the state; 0 before any work.
    """

    steps: int = 0
    batches: int = 0
    moments: dict[str, Tensor] = field(default_factory=dict)
    personal: dict[str, Tensor] = field(default_factory=dict)
    history: dict[str, Tensor] = field(default_factory=dict)
    loss_scale: LossScale = INITIAL_SCALE
    id: int = 0

    @staticmethod
    def of(state: RecordDict) -> "Memory":
        """Return the stored state; that before any work if nothing is stored."""
        if _COUNTS not in state:
            return Memory()
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

    def save(self, parent: Path, join: JoinInfo, run: RunSpec) -> None:
        """Write a checkpoint of the state, and remove those that the run cannot go back to.

        Args:
            parent: The folder of the client's checkpoints.
            join: The information for the work that made the state.
            run: The run.

        Raises:
            StorageError: A file cannot be written.
        """
        Checkpoint(
            round=join.round,
            state=self.id,
            owner=_owner(parent),
            settings=run.settings,
            facts=self._counts,
            tensors={name: getattr(self, name) for name in _KEPT},
        ).write(parent)
        prune_states(parent, {self.id, *join.kept_states})

    @staticmethod
    def restore(parent: Path, state: int, run: RunSpec) -> "Memory":
        """Return the state with this id from its checkpoint.

        Raises:
            CheckpointError: There is no such checkpoint, or it is damaged.
        """
        atomic.recover(parent)
        if state not in (found := states_in(parent)):
            names = ", ".join(path.name for path in found.values()) or "nothing"
            raise CheckpointError(
                f"{parent} does not hold the state {state:016x} from which the run continues, but "
                f"{names}; start this client on the machine with that folder (node config "
                "state-dir), or start a new run without resume"
            )
        checkpoint = Checkpoint.read(found[state], run, _owner(parent), _KEPT)
        groups: dict[str, Any] = {name: checkpoint.tensors[name] for name in _KEPT}
        return Memory._of(groups, checkpoint.facts)

    @staticmethod
    def intact(parent: Path, run: RunSpec) -> list[int]:
        """Return the ids of the states that can be restored, and log each damaged checkpoint.

        Raises:
            ConfigError: A checkpoint was written with other settings.
        """
        atomic.recover(parent)
        found = []
        for state, path in states_in(parent).items():
            try:
                Checkpoint.read(path, run, _owner(parent), _KEPT)
            except CheckpointError as exc:
                log.warning("%s", exc)
            else:
                found.append(state)
        return found

    @property
    def _counts(self) -> dict[str, Any]:
        scale = {"loss_scale": self.loss_scale.value, "good_steps": self.loss_scale.good_steps}
        return {"steps": self.steps, "batches": self.batches, "id": self.id, **scale}

    @staticmethod
    def _of(groups: dict[str, Any], counts: dict[str, Any]) -> "Memory":
        scale = LossScale(value=counts["loss_scale"], good_steps=counts["good_steps"])
        kept = {name: counts[name] for name in ("steps", "batches", "id")}
        return Memory(**groups, **kept, loss_scale=scale)


def _record_of(info: Hello | JoinInfo) -> ConfigRecord:
    # Flower's records hold lists, not tuples.
    values = asdict(info).items()
    return ConfigRecord({k: list(v) if isinstance(v, tuple) else v for k, v in values})


def _fields_of(content: RecordDict, key: str, kind: type[Hello | JoinInfo]) -> dict[str, Any]:
    found: dict[str, Any] = dict(content.config_records.get(key, ConfigRecord()))
    if odd := sorted(found.keys() ^ {each.name for each in fields(kind)}):
        raise ProtocolError(
            f"the server's record {key!r} has {len(found)} values, not {len(fields(kind))}; the "
            f"first difference is {peer_text(odd[0])!r}; run the same code at both sides"
        )
    lists = {name: found[name] for name in _LISTS if name in found}
    for name, value in lists.items():
        if not isinstance(value, list):
            raise ProtocolError(
                f"the server sent {peer_text(repr(value))} as {name}, which must be a list; run "
                "the same code at both sides"
            )
    return {**found, **{name: tuple(value) for name, value in lists.items()}}


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
