"""What training takes at a client that holds a model's two ends, at a trunk, and in one piece.

*Computed*: one training step on fake tensors, which have shapes and no memory; every tensor that
lives at a time is counted, so a model of any size can be asked. *Measured*: two real steps in a
process of its own, of which the operating system tells the memory. That has the libraries'
buffers and what the allocator does not give back on top.
"""

import copy
import math
import weakref
from collections.abc import Iterable
from multiprocessing import get_context
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from fedsplit.config import Variants, from_yaml, to_yaml
from fedsplit.console import quiet_libraries
from fedsplit.model import ClientPart, TrunkPart, connect, model_class_for, plan_for
from fedsplit.model.acceleration import apply_training_options, autocast
from fedsplit.model.describe import config_of
from fedsplit.model.dryrun import tensors_in
from fedsplit.model.lora import add_adapters, trainable
from fedsplit.model.source import on_meta
from fedsplit.model.stage import Part, part_class
from fedsplit.optimization import PartOptimizer
from fedsplit.runs.compare import Columns, Row, Table
from fedsplit.runs.metrics import in_mib
from fedsplit.spec import RunSpec, TrainSpec
from fedsplit.spec.train import EIGHT_BIT

_MEASURED_BELOW = 4 << 30
"""A step that takes less than this many bytes at the whole model is measured too."""

_LEAST_8BIT, _PER_SCALE = 4096, 256
"""Of bitsandbytes: a parameter with fewer entries keeps 32 bits; entries that share a scale."""


def measured(sweep: RunSpec, variants: Variants) -> Table:
    """A row for each variant, which names a model and what of it trains; nothing is kept.

    The figures are `client_fraction_<variant>`, computed, of all bytes; `trained_fraction_...` of
    trained parameters; and `measured_fraction_...` where the model is small enough to train here.
    """
    quiet_libraries()
    rows = []
    for name, runs in variants.items():
        rows.append(_row(name, runs[0]))
        print(f"{name}: {rows[-1]['client_fraction']:.3f} of the whole", flush=True)
    figures = {
        f"{figure}_{row['name']}": row[figure]
        for figure in ("client_fraction", "trained_fraction", "measured_fraction")
        for row in rows
        if row.get(figure)
    }
    return Table(rows=rows, columns=_COLUMNS, figures=figures)


def _of_both(name: str, tell: Any) -> Any:
    def told(row: Row) -> str:
        both = row["client"].get(name), row["whole"].get(name)
        return "" if None in both else " of ".join(map(tell, both))

    return told


_COLUMNS: Columns = {
    "variant": lambda row: str(row["name"]),
    "weights": _of_both("weights", in_mib),
    "trained": _of_both("trained", lambda count: f"{count / 1e6:.2f} M"),
    "activations": _of_both("activations", in_mib),
    "peak, computed": _of_both("peak", in_mib),
    "fraction": lambda row: f"{row['client_fraction']:.3f}",
    "peak, measured": _of_both("measured", in_mib),
    "measured fraction": lambda row: (
        f"{row['measured_fraction']:.3f}" if row["measured_fraction"] else ""
    ),
}


def _row(name: str, run: RunSpec) -> Row:
    row: Row = {
        "name": name,
        "family": run.model.family,
        "split": str(run.split),
        "lora": run.lora.enabled,
        "batch_size": run.train.batch_size,
        "sequence_length": run.data.sequence_length,
        "client": computed(run, part="client"),
        "whole": computed(run, part="whole"),
        "measured_fraction": None,
    }
    client, whole = row["client"], row["whole"]
    row["client_fraction"] = client["peak"] / whole["peak"]
    row["trained_fraction"] = client["trained"] / whole["trained"]
    if whole["peak"] < _MEASURED_BELOW:
        client["measured"], whole["measured"] = resident(run, "client"), resident(run, "whole")
        row["measured_fraction"] = client["measured"] / whole["measured"]
    return row


# --- computed -------------------------------------------------------------------------------------


def computed(run: RunSpec, part: str) -> dict[str, int]:
    """Bytes of weights, gradients, moments, activations and all at once; trained parameters.

    The activations are what a forward leaves for its backward. They go while the gradients come,
    so that the peak is less than the sum of all.

    Args:
        run: Names model, cut, adapters, batch size and sequence length.
        part: `client` (bottom and top), `trunk` or `whole`.
    """
    model = _model(run, part)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _give_memory(model)
        trained = list(trainable(model).values())
        live = _LiveBytes()
        live.add([*model.parameters(), *model.buffers()])
        weights = live.now
        moments = [moment for p in trained for moment in _moments(p, run.train)]
        live.add(moments)
        with live:
            loss = _loss(model, run)
            activations = live.now - weights - _num_bytes(moments)
            loss.backward()
    return {
        "weights": weights,
        "gradients": _num_bytes(trained),
        "moments": _num_bytes(moments),
        "activations": activations,
        "peak": live.peak,
        "trained": sum(p.numel() for p in trained),
    }


def _moments(parameter: Tensor, train: TrainSpec) -> list[Tensor]:
    """What the optimizer keeps of a parameter from step to step, each the size it really has."""
    if train.optimizer == "sgd":
        return [torch.zeros_like(parameter)] if train.momentum else []
    if train.optimizer not in EIGHT_BIT:
        return [torch.zeros_like(parameter) for _ in range(2)]
    count = parameter.numel()
    if count < _LEAST_8BIT:
        return [torch.zeros(count) for _ in range(2)]
    scales = math.ceil(count / _PER_SCALE)
    return [torch.zeros(n, dtype=d) for n, d in 2 * [(count, torch.uint8), (scales, torch.float32)]]


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that live at a time, each storage once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._storages: dict[int, int] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count these for as long as they live."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._storages:
                self._storages[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._remove, storage._cdata)

    def _remove(self, key: int) -> None:
        self.now -= self._storages.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and count what it returns."""
        out = func(*args, **(kwargs or {}))
        self.add(tensors_in(out))
        return out


# --- measured -------------------------------------------------------------------------------------


def resident(run: RunSpec, part: str) -> int:
    """Bytes by which a process grows at most that builds the model and takes two steps."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # what it imports takes seconds
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(to_yaml(run), part, sender), daemon=True)
    process.start()
    sender.close()
    with receiver:
        told = int(receiver.recv_bytes())
    process.join()
    return told


def _train(config: str, part: str, sender: Any) -> None:
    quiet_libraries()
    torch.set_num_threads(1)
    run = from_yaml(config)
    growth = _Resident()
    model = _model(run, part)
    _give_memory(model)
    for tensor in model.buffers():
        tensor.zero_()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    optimizer = PartOptimizer(trainable(model), run.train)
    with growth:
        for step in range(2):  # in the second one the moments are there from the beginning
            _loss(model, run).backward()
            optimizer.step(step)
    sender.send_bytes(str(growth.peak).encode())


class _Resident(TorchDispatchMode):
    """By how much this process has grown at most, asked after every operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._process = psutil.Process()
        self._before: int = self._process.memory_info().rss

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and look."""
        out = func(*args, **(kwargs or {}))
        self.peak = max(self.peak, self._process.memory_info().rss - self._before)
        return out


# --- one step -------------------------------------------------------------------------------------


def _model(run: RunSpec, part: str) -> PreTrainedModel:
    """The part, or the unsplit model, without memory for its tensors."""
    config = config_of(run, None)
    family: type[PreTrainedModel] = model_class_for(config)
    if part != "whole":
        plan = plan_for(family, config)
        trunk_blocks = range(*run.split.cut(plan.num_blocks, family.__name__))
        kind: type[Part] = ClientPart if part == "client" else TrunkPart
        family = part_class(kind, family, plan, trunk_blocks)
    model = on_meta(family, copy.deepcopy(config))
    model.train()
    nn.Module.to(model, getattr(torch, run.model.dtype))
    add_adapters(model, run.lora)
    apply_training_options(model, run.train)
    if isinstance(model, ClientPart):
        connect(model, _carry)
    return model


def _give_memory(model: PreTrainedModel) -> None:
    model.to_empty(device="cpu")
    model.tie_weights()


def _loss(model: PreTrainedModel, run: RunSpec) -> Tensor:
    ids_BT = torch.zeros(run.train.batch_size, run.data.sequence_length, dtype=torch.long)
    with autocast(run.model, model.device):
        if isinstance(model, TrunkPart):  # which has no loss: what comes back is all its gradient
            return model.run(_smashed(model, ids_BT)).sum()
        loss: Tensor = model(ids_BT, labels=ids_BT, use_cache=False).loss
    return loss


def _smashed(model: TrunkPart, ids_BT: Tensor) -> Tensor:
    shape_BTD = (*ids_BT.shape, model.config.hidden_size)
    return torch.zeros(shape_BTD, dtype=model.dtype).requires_grad_()


def _carry(smashed_BTD: Tensor, **_: Any) -> Tensor:
    """A trunk that is elsewhere: what it answers is a new tensor, and so is its gradient."""
    out_BTD: Tensor = _Answer.apply(smashed_BTD)  # type: ignore[no-untyped-call]
    return out_BTD


class _Answer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, smashed_BTD: Tensor) -> Tensor:
        return smashed_BTD.clone()

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> Tensor:
        return grad_BTD.clone()


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
