"""The memory that training takes at a client, at a trunk, and with the unsplit model.

*Computed*: one training step on fake tensors, which have shapes but no memory. The peak is that of
the bytes of all live tensors, so a model of any size can be computed. *Measured*: the growth of a
process that takes two real steps, as the operating system reports it. This includes buffers of
libraries, and memory that the allocator does not return. As a program it measures a model in
several precisions (`simulations/quantized.py`).
"""

import copy
import math
import sys
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
from fedsplit.spec import RunSpec, TrainSpec
from fedsplit.spec.train import EIGHT_BIT
from fedsplit.telemetry.round import in_mib

_MEASURED_BELOW = 4 << 30
"""Models whose unsplit step takes fewer bytes than this are measured too."""

_LEAST_8BIT, _PER_SCALE = 4096, 256
"""Of bitsandbytes: parameters with fewer entries keep 32 bits; the number of entries per scale."""


def measured(sweep: RunSpec, variants: Variants) -> Table:
    """Return a table with a row for each variant, whose first run names a model and its adapters.

    The figures are fractions of the unsplit model's: `client_fraction_<variant>` of the computed
    peak, `trained_fraction_...` of the trained parameters, and `measured_fraction_...` of the
    measured peak, for models that are small enough to train here.
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


def _of_both(name: str, to_text: Any) -> Any:
    def cell(row: Row) -> str:
        both = row["client"].get(name), row["whole"].get(name)
        return "" if None in both else " of ".join(map(to_text, both))

    return cell


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
    """Return the memory of one training step, computed on fake tensors.

    Activations are the tensors that a forward keeps for its backward. They are freed while
    gradients are allocated, so the peak is less than the sum.

    Args:
        run: The run, for its model, split, adapters, batch size and sequence length.
        part: `client` (bottom and top), `trunk` or `whole`.

    Returns:
        `weights`, `gradients`, `moments`, `activations` and `peak` in bytes, and `trained`, the
        number of trained parameters.
    """
    model = _model(run, part)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _give_memory(model)
        trained = list(trainable(model).values())
        live = _LiveBytes()
        # What exists before the step is not returned by an operator, so it is added here.
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
    """Return the optimizer's state of a parameter, as tensors of the sizes that it has."""
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
    """Counts the bytes of all live tensors, each storage once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._storages: dict[int, int] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors until they are freed."""
        for tensor in tensors:
            # Views share a storage, which counts once.
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
        """Run the operator and count its results."""
        out = func(*args, **(kwargs or {}))
        self.add(tensors_in(out))
        return out


# --- measured -------------------------------------------------------------------------------------


def resident(run: RunSpec, part: str) -> int:
    """Return the largest growth, in bytes, of a process that builds a model and takes two steps."""
    # A process of its own, because an allocator does not return all memory of earlier work.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # its imports take seconds
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(to_yaml(run), part, sender), daemon=True)
    process.start()
    sender.close()
    with receiver:
        growth = int(receiver.recv_bytes())
    process.join()
    return growth


def _train(config: str, part: str, sender: Any) -> None:
    quiet_libraries()
    torch.set_num_threads(1)
    run = from_yaml(config)
    growth = _Resident()
    model = _model(run, part)
    _give_memory(model)
    # The system counts a page only when it is written, so every tensor gets values.
    for tensor in model.buffers():
        tensor.zero_()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    optimizer = PartOptimizer(trainable(model), run.train)
    with growth:
        for step in range(2):  # in the second one the moments exist from the start
            _loss(model, run).backward()
            optimizer.step(step)
    sender.send_bytes(str(growth.peak).encode())


class _Resident(TorchDispatchMode):
    """Measures the largest growth of this process, after every operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._process = psutil.Process()
        self._before: int = self._process.memory_info().rss

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and measure."""
        out = func(*args, **(kwargs or {}))
        self.peak = max(self.peak, self._process.memory_info().rss - self._before)
        return out


# --- one step -------------------------------------------------------------------------------------


def _model(run: RunSpec, part: str) -> PreTrainedModel:
    """Return the part, or the unsplit model, without memory for its tensors."""
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
    # `to_empty` makes new tensors, which unties tied weights.
    model.tie_weights()


def _loss(model: PreTrainedModel, run: RunSpec) -> Tensor:
    ids_BT = torch.zeros(run.train.batch_size, run.data.sequence_length, dtype=torch.long)
    with autocast(run.model, model.device):
        # A trunk has no loss; the sum gives its output a gradient of the right size.
        if isinstance(model, TrunkPart):
            return model.run(_smashed(model, ids_BT)).sum()
        loss: Tensor = model(ids_BT, labels=ids_BT, use_cache=False).loss
    return loss


def _smashed(model: TrunkPart, ids_BT: Tensor) -> Tensor:
    shape_BTD = (*ids_BT.shape, model.config.hidden_size)
    return torch.zeros(shape_BTD, dtype=model.dtype).requires_grad_()


def _carry(smashed_BTD: Tensor, **_: Any) -> Tensor:
    """Stand in for a remote trunk, whose output and gradient arrive as new tensors."""
    out_BTD: Tensor = _RemoteCopy.apply(smashed_BTD)  # type: ignore[no-untyped-call]
    return out_BTD


class _RemoteCopy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, smashed_BTD: Tensor) -> Tensor:
        return smashed_BTD.clone()

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> Tensor:
        return grad_BTD.clone()


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


if __name__ == "__main__":
    from simulations.quantized import main

    sys.exit(main())
