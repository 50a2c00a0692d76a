"""The throughput of a trunk with many clients, and the cost of a sample.

Shapes: B sequences of a client, T tokens, D hidden width. The model has the shape of GPT-2 small
and runs on the CPU. Each client has a small batch, and the trunk runs all batches in one pass. For
the first figure clients have no blocks and always send the same tensors, so that only the trunk is
measured. For the second figure all clients are complete and run in one process; the reference is
the unsplit model with one batch of the same total size. docs/performance.md explains the figures.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from threading import Barrier
from time import perf_counter

import torch

from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.client.unsplit import NoTrunk
from fedsplit.model import connect
from fedsplit.transport.client import GrpcLink
from simulations.bench.models import GPT2_SMALL, TOY, Shape
from simulations.bench.processes import Answers, Process, process, threads_of_torch
from simulations.bench.report import Report, in_turns
from simulations.bench.roles import name_of, trunk_server

THREADS = 2
"""Threads of the trunk and of the unsplit model. The clients' process has one for each client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The model, the numbers of clients, the steps of each client in a turn, and the turns."""

    shape: Shape
    counts: tuple[int, ...]
    crowd: int
    steps: int
    turns: int


SIZES = {
    "full": Size(
        shape=replace(GPT2_SMALL, rows=1, tokens=128, lora_rank=8),
        counts=(1, 2, 4, 8, 16),
        crowd=8,
        steps=2,
        turns=5,
    ),
    "toy": Size(
        shape=replace(TOY, rows=1, tokens=32, lora_rank=2), counts=(1, 2), crowd=2, steps=2, turns=1
    ),
}


def measure(size: str) -> Report:
    """Fill a report with the figures of many clients; `size` is `full` or `toy`."""
    report, what = Report(), SIZES[size]
    report.row("machine", cores=os.cpu_count(), torch=torch.__version__, model=str(what.shape))
    _throughput(report, what)
    report.figures["sample_cost_8c"] = _cost(report, what, trains="adapters")
    all_weights = replace(what.shape, lora_rank=0)
    _cost(report, replace(what, shape=all_weights), trains="all weights")
    return report


# --- the throughput of the trunk ------------------------------------------------------------------


def _throughput(report: Report, what: Size) -> None:
    """Measure samples per second of the trunk, with all clients in one pass and in turns."""
    most = max(what.counts)
    with ExitStack() as stack:
        crowds = {
            way: stack.enter_context(_crowd(replace(what.shape, together=together), most))
            for way, together in (("together", most), ("in turns", 1))
        }
        measures = {
            f"{way} {count}": partial(_samples_per_s, crowds[way], count, what)
            for way, counts in (("together", what.counts), ("in turns", (what.crowd,)))
            for count in counts
        }
        found = in_turns(what.turns, measures)
    for name, values in found.items():
        report.spread("samples_per_s", values, by=name)
    together = [median(found[f"together {count}"]) for count in what.counts]
    growth = [more / fewer for fewer, more in zip(together, together[1:], strict=False)]
    report.row("growth from each number of clients to the next", ratios=growth)
    report.figures["least_growth"] = min(growth)


def _samples_per_s(crowd: Process, count: int, what: Size) -> float:
    return count * what.shape.rows * what.steps / float(crowd.ask("steps", count, what.steps))


# --- the cost of a sample -------------------------------------------------------------------------


def _cost(report: Report, what: Size, trains: str) -> float:
    """Measure seconds per sample of clients and trunk, over those of the unsplit model."""
    shape, count = replace(what.shape, together=what.crowd), what.crowd
    large = replace(shape, rows=count * shape.rows)
    model = large.adapted(large.whole())
    unsplit = ClientTrainer(model, NoTrunk(model, client=name_of(0)), large.run)
    with _crowd(shape, count, whole=True) as clients, threads_of_torch(THREADS):
        measures: dict[str, Callable[[], float]] = {
            "clients": lambda: float(clients.ask("steps", count, what.steps)),
            "unsplit": lambda: _seconds(unsplit, large, what.steps),
        }
        found = in_turns(what.turns, measures)
    for name, values in found.items():
        per_sample = [each / (large.rows * what.steps) for each in values]
        report.spread("s_per_sample", per_sample, by=name, trains=trains)
    return report.ratio("clients / unsplit", found["clients"], found["unsplit"], trains=trains)


def _seconds(trainer: ClientTrainer, shape: Shape, steps: int) -> float:
    batch = shape.batch()
    began = perf_counter()
    for _ in range(steps):
        trainer.step([batch])
    return perf_counter() - began


# --- the processes --------------------------------------------------------------------------------


@contextmanager
def _crowd(shape: Shape, count: int, *, whole: bool = False) -> Iterator[Process]:
    """Run a trunk in one process, and `count` clients in another."""
    with process(trunk_server, shape, threads=THREADS) as server:
        tokens = [server.ask("token", name_of(i)) for i in range(count)]
        with process(crowd, shape, server.ask("address"), tokens, whole) as clients:
            yield clients


@contextmanager
def crowd(
    shape: Shape, address: str, tokens: list[str], whole: bool, first: int = 0
) -> Iterator[Answers]:
    """Run clients in one process, with a thread each; `first` is the number of the first one.

    Its answer `steps(count, number)` has `count` clients take `number` steps each, and returns the
    seconds until the last has finished.
    """
    make, model = _complete_client if whole else empty_client, shape.client()
    with ExitStack() as stack:
        links = [
            stack.enter_context(closing(GrpcLink(address, token=token, wire=shape.run.wire)))
            for token in tokens
        ]
        trunks = [
            RemoteTrunk(link, model, shape.run, client=name_of(first + i))
            for i, link in enumerate(links)
        ]
        steppers: list[Callable[[], object]] = []
        pool = stack.enter_context(ThreadPoolExecutor(len(links)))

        def steps(count: int, number: int) -> float:
            while len(steppers) < count:
                steppers.append(make(shape, trunks[len(steppers)]))
            marks: list[float] = []
            gate = Barrier(count, action=lambda: marks.append(time.monotonic()))
            work = partial(_work, number=number, gate=gate)
            list(pool.map(work, trunks[:count], steppers[:count]))
            began, ended = marks
            return ended - began

        yield {"steps": steps}


def _work(trunk: RemoteTrunk, step: Callable[[], object], *, number: int, gate: Barrier) -> None:
    with trunk.session():
        # All pass it before and after their steps, so that no session's begin or end is timed.
        gate.wait()
        try:
            for _ in range(number):
                step()
        except Exception:
            gate.abort()
            raise
        gate.wait()


def _complete_client(shape: Shape, trunk: RemoteTrunk) -> Callable[[], object]:
    """Return the step of a client with bottom and top."""
    model = shape.client()
    connect(model, trunk)
    trainer, batch = ClientTrainer(model, trunk, shape.run), shape.batch()
    return lambda: trainer.step([batch])


def empty_client(shape: Shape, trunk: RemoteTrunk) -> Callable[[], object]:
    """Return the step of a client without blocks, which sends constant tensors to the trunk."""
    smashed_BTD = shape.smashed(shape.rows, shape.tokens)
    num_tokens = shape.rows * (shape.tokens - 1)

    def step() -> None:
        out_BTD = trunk(smashed_BTD.clone().requires_grad_())
        out_BTD.backward(smashed_BTD / smashed_BTD.numel())
        trunk.step(step=0, num_tokens=num_tokens, client_sq_norm=0.0)

    return step
