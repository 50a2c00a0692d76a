"""The same three stages under torch.distributed.pipelining over gloo, as a reference.

Shapes: B sequences, T tokens, D hidden width, V vocabulary. The differences: the stages are one
program and trust one another, only the last stage has labels, the head is not tied to the
embeddings, and gradients are not clipped.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn import functional as F

from simulations.bench.models import Shape
from simulations.bench.processes import Answers, Process, process

STAGES = 3


class Stages:
    """The processes of a pipeline."""

    def __init__(self, processes: list[Process]) -> None:
        self._processes = processes

    def seconds(self, steps: int) -> float:
        """Take `steps` steps in all stages, and return the seconds of the slowest."""
        for each in self._processes:
            each.begin("steps", steps)
        return max(float(each.end()) for each in self._processes)


@contextmanager
def stages(shape: Shape, threads: int) -> Iterator[Stages]:
    """Run a pipeline of three processes, with `threads` threads each, inside the block."""
    with TemporaryDirectory() as folder, ExitStack() as stack:
        rendezvous = f"file://{folder}/rendezvous"
        yield Stages(
            [
                stack.enter_context(process(stage, shape, rank, rendezvous, threads=threads))
                for rank in range(STAGES)
            ]
        )


@contextmanager
def stage(shape: Shape, rank: int, rendezvous: str) -> Iterator[Answers]:
    """Run one stage; its answer `steps` takes so many steps and returns their seconds."""
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=STAGES)
    module = _module(shape, rank)
    pipeline_stage = PipelineStage(module, rank, STAGES, torch.device("cpu"))
    # One micro-batch, as in the plain step of the split model that it is compared with.
    schedule = ScheduleGPipe(pipeline_stage, n_microbatches=1, loss_fn=_loss)
    optimizer = torch.optim.AdamW(module.parameters(), lr=shape.run.train.lr, fused=True)
    ids_BT = shape.batch().labels

    def steps(number: int) -> float:
        began = perf_counter()
        for _ in range(number):
            if rank == 0:
                schedule.step(ids_BT)
            elif rank == STAGES - 1:
                schedule.step(target=ids_BT, losses=[])
            else:
                schedule.step()
            optimizer.step()
            optimizer.zero_grad()
        return perf_counter() - began

    yield {"steps": steps}
    dist.destroy_process_group()


class _Blocks(nn.Module):
    """Some of GPT-2's blocks, with the embeddings before the first or the head after the last."""

    def __init__(self, model: Any, begin: int, end: int) -> None:
        super().__init__()
        backbone = model.transformer
        self.blocks = backbone.h[begin:end]
        self.before = nn.ModuleList([backbone.wte, backbone.wpe] if begin == 0 else [])
        is_last = end == len(backbone.h)
        self.after = nn.Sequential(*([backbone.ln_f, model.lm_head] if is_last else []))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ids [B, T] or hidden states [B, T, D] to hidden states or logits [B, T, V]."""
        hidden_BTD = inputs
        if self.before:
            tokens, positions = self.before
            hidden_BTD = tokens(inputs) + positions(torch.arange(inputs.shape[1]))
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD)
        out: Tensor = self.after(hidden_BTD)
        return out


def _module(shape: Shape, rank: int) -> nn.Module:
    split, model = shape.run.split, shape.whole()
    cuts = [0, split.bottom, shape.blocks - split.top, shape.blocks]
    model.train()
    return _Blocks(model, cuts[rank], cuts[rank + 1])


def _loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
