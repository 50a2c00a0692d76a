"""The speed of training steps with SDPA, bfloat16 and torch.compile.

A step includes both optimizers. Client and trunk are in this process, connected by a `LocalLink`,
on a GPU if there is one, else on the CPU. The benchmark needs only the core, not flwr, hydra or
grpc.
"""

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers

from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.data.batches import Batch
from fedsplit.link import LocalLink
from fedsplit.model import connect
from fedsplit.model.describe import config_of, parts_of
from fedsplit.spec import DataSpec, ModelSpec, RunSpec, SplitSpec, TrainSpec
from fedsplit.trunk.service import TrunkService
from simulations.bench.report import Report, in_turns

_EAGER = {"attention": "eager"}
_SDPA = {"attention": "sdpa"}
_AUTO = {"attention": "auto", "autocast": "bfloat16"}
_COMPILED = {"compile_client": "default", "compile_trunk": "default"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Models by name with their batches (sequences, tokens), and the options that compile them."""

    models: dict[str, tuple[ModelSpec, tuple[int, int]]]
    turns: int
    compiled: dict[str, str]


def _gpt2(blocks: int, hidden: int, heads: int, vocabulary: int) -> ModelSpec:
    sizes = {"n_layer": blocks, "n_embd": hidden, "n_head": heads, "vocab_size": vocabulary}
    quiet = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return ModelSpec(config=sizes | quiet)


_SMALL = _gpt2(12, 768, 12, 50257)
_LLAMA_1B = ModelSpec(
    family="llama",
    config={
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
)

SIZES = {
    ("full", "cpu"): Size(models={"gpt2": (_SMALL, (4, 128))}, turns=5, compiled=_COMPILED),
    ("full", "cuda"): Size(
        models={"gpt2": (_SMALL, (8, 1024)), "llama_1b": (_LLAMA_1B, (4, 1024))},
        turns=10,
        compiled=_COMPILED,
    ),
    ("toy", "cpu"): Size(
        models={"gpt2": (_gpt2(4, 32, 2, 128), (2, 16))},
        turns=1,
        compiled={"compile_trunk": "default"},
    ),
}
SIZES["toy", "cuda"] = SIZES["toy", "cpu"]


def measure(size: str) -> Report:
    """Return the figures of a size; figures without a model in their name are of GPT-2."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report, of = Report(), SIZES[size, device.type]
    report.row(
        "machine",
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    for name, (model, batch) in of.models.items():
        figures = _of_model(report, of, name, _run(model, batch), device)
        suffix = "" if name == "gpt2" else f"_{name}"
        report.figures |= {f"{figure}{suffix}": value for figure, value in figures.items()}
    return report


def _of_model(
    report: Report, of: Size, name: str, run: RunSpec, device: torch.device
) -> dict[str, float]:
    variants = {
        "eager": _changed(run, _EAGER),
        "sdpa": _changed(run, _SDPA),
        "bf16": _changed(run, _AUTO),
        "compiled": _changed(run, _SDPA, of.compiled),
    }
    with ExitStack() as opened:
        steppers = {k: _Stepper(each, device, opened) for k, each in variants.items()}
        losses = {k: each.loss() for k, each in steppers.items()}
        seconds = in_turns(of.turns, {k: each.seconds for k, each in steppers.items()})
        peaks = {k: each.peak_bytes() for k, each in steppers.items()}
    for variant, values in seconds.items():
        report.spread("a step, s", values, model=name, variant=variant)
    pairs = {"sdpa": "eager", "bf16": "sdpa", "compiled": "sdpa"}
    figures = {
        f"{new}_speedup": report.ratio(f"{new} over {old}", seconds[old], seconds[new], model=name)
        for new, old in pairs.items()
    }
    gaps = {k: abs(loss - losses["eager"]) / losses["eager"] for k, loss in losses.items()}
    report.row("first loss against eager, relative", model=name, **gaps)
    if device.type == "cuda":
        report.row("peak of a step over what is there before, bytes", model=name, **peaks)
        figures["sdpa_memory_saved"] = 1 - peaks["sdpa"] / peaks["eager"]
    return {**figures, "largest_loss_gap": max(gaps.values())}


class _Stepper:
    """A client and a trunk of one run, which take steps."""

    def __init__(self, run: RunSpec, device: torch.device, opened: ExitStack) -> None:
        parts = parts_of(run, config_of(run, None), device.type)
        for part in (parts.client, parts.trunk):
            torch.nn.Module.to(part, device)
        service = opened.enter_context(TrunkService(parts.trunk, run))
        link = LocalLink(service, service.admit("client"))
        trunk = RemoteTrunk(link, parts.client, run, client="client")
        connect(parts.client, trunk)
        self._trainer = ClientTrainer(parts.client, trunk, run)
        self._device = device
        vocabulary: int = parts.client.config.vocab_size
        self._batch = _batch(run.train.batch_size, run.data.sequence_length, vocabulary)
        opened.enter_context(trunk.session())

    def loss(self) -> float:
        """Take a step, and return its loss."""
        return self._trainer.step([self._batch]).loss

    def seconds(self) -> float:
        """Take a step, and return its seconds until the device has finished it."""
        # Kernels run asynchronously: without waiting, only their launch would be timed.
        self._wait()
        began = time.perf_counter()
        self.loss()
        self._wait()
        return time.perf_counter() - began

    def peak_bytes(self) -> int:
        """Take a step, and return the peak of GPU memory that it adds, in bytes; 0 on a CPU."""
        if self._device.type != "cuda":
            return 0
        self._wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.loss()
        self._wait()
        return torch.cuda.max_memory_allocated() - before

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def _run(model: ModelSpec, batch: tuple[int, int]) -> RunSpec:
    sequences, tokens = batch
    return RunSpec(
        clients=1,
        model=model,
        split=SplitSpec.parse("1/*/1"),
        data=DataSpec(sequence_length=tokens),
        train=TrainSpec(batch_size=sequences),
    )


def _changed(run: RunSpec, model: dict[str, Any], train: dict[str, Any] | None = None) -> RunSpec:
    return replace(
        run, model=replace(run.model, **model), train=replace(run.train, **(train or {}))
    )


def _batch(sequences: int, tokens: int, vocabulary: int) -> Batch:
    chance = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(vocabulary, (sequences, tokens), generator=chance)
    counted = sequences * (tokens - 1)
    return Batch(
        inputs={"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)},
        labels=ids_BT,
        num_tokens=counted,
        num_bytes=counted,
    )
