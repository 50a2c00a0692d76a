"""What travels in Flower's messages beside what Flower's own strategies put there."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedsplit.errors import ModelMismatch

ARRAYS = "arrays"
"""Key of the halves in a message: the trained tensors of bottom and top."""
METRICS = "metrics"
"""Key of a reply's metrics."""
WEIGHT = "num-examples"
"""Flower's key of a client's weight; here it counts tokens."""
_TICKET, _COUNTS, _MOMENTS = "fedsplit", "counts", "moments"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """What a client needs to take part in a round.

    `address` and `token` lead to the trunk, `config` is the run's fingerprint, `tokenizer` a
    tokenizer as JSON (empty for a checkpoint, which has its own).
    """

    client: str
    round: int
    address: str
    token: str
    config: str
    tokenizer: str

    def put_into(self, content: RecordDict) -> RecordDict:
        """A message's content with the ticket beside it."""
        return RecordDict({**content, _TICKET: ConfigRecord(asdict(self))})

    @staticmethod
    def of(content: RecordDict) -> "Ticket":
        """The ticket in a message's content."""
        record = content.config_records[_TICKET]
        return Ticket(**dict(record))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a client keeps from one message to the next, in Flower's `context.state`.

    `steps` it has taken, `batches` it has read, and the `moments` of its optimizer.
    """

    steps: int
    batches: int
    moments: dict[str, Tensor]

    @staticmethod
    def of(state: RecordDict) -> "Memory":
        """What was kept; nothing yet for a new client."""
        counts = dict(state.metric_records.get(_COUNTS, {}))
        moments = state.array_records.get(_MOMENTS, ArrayRecord())
        return Memory(
            steps=cast(int, counts.get("steps", 0)),
            batches=cast(int, counts.get("batches", 0)),
            moments=dict(moments.to_torch_state_dict()),
        )

    def put_into(self, state: RecordDict) -> None:
        """Keep this, in place of what was kept."""
        state[_COUNTS] = MetricRecord({"steps": self.steps, "batches": self.batches})
        state[_MOMENTS] = to_arrays(self.moments)


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as Flower carries them; bfloat16 travels as float32, which holds it exactly."""
    wide = {torch.bfloat16: torch.float32}
    return ArrayRecord(
        {name: t.detach().to("cpu", wide.get(t.dtype, t.dtype)) for name, t in tensors.items()}
    )


def load_arrays(into: Mapping[str, Tensor], arrays: ArrayRecord) -> None:
    """Copy a record's arrays into tensors of the same names.

    Raises:
        ModelMismatch: The names or shapes differ.
    """
    state = arrays.to_torch_state_dict()
    if state.keys() != into.keys():
        odd = sorted(state.keys() ^ into.keys())
        raise ModelMismatch(
            f"the halves that came hold {len(state)} tensors, this model trains {len(into)}; the "
            f"first difference is {odd[0]!r}; start both sides from the same model and config"
        )
    with torch.no_grad():
        for name, tensor in into.items():
            if tensor.shape != state[name].shape:
                raise ModelMismatch(
                    f"{name} came with shape {tuple(state[name].shape)}, but is "
                    f"{tuple(tensor.shape)} here; start both sides from the same model"
                )
            tensor.copy_(state[name])


def num_bytes(arrays: ArrayRecord) -> int:
    """Bytes of a record's arrays as they travel."""
    return sum(len(array.data) for array in arrays.values())
