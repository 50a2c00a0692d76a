"""A training step of a split model against the unsplit one, and its wire against the naive design.

Shapes: B sequences, T tokens. The model has the shape of GPT-2 small, in float32 on the CPU. The
client is this process, and the trunk is in another process behind gRPC on loopback. Each has as
many threads as the unsplit model. Both models train the same batch from the same weights, and so do
three stages under torch.distributed.pipelining. `simulations.bench.overlap` adds micro-batches.
docs/performance.md explains the figures.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import torch

from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.client.unsplit import NoTrunk
from fedsplit.model import connect
from fedsplit.spec import WireSpec
from fedsplit.transport.client import GrpcLink
from simulations.bench.echo import talkers
from simulations.bench.links import WatchedLink
from simulations.bench.models import GPT2_SMALL, TOY, Shape
from simulations.bench.overlap import measure_overlap
from simulations.bench.pipelining import stages
from simulations.bench.processes import process, threads_of_torch
from simulations.bench.report import Report, in_turns
from simulations.bench.roles import name_of, trunk_server

THREADS = 2
"""Threads of each process that computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The model, its steps and the round trips of its tensors in a turn, and the turns."""

    shape: Shape
    steps: int
    trips: int
    turns: int


SIZES = {
    "full": Size(shape=replace(GPT2_SMALL, rows=4, tokens=128), steps=4, trips=10, turns=7),
    "toy": Size(shape=replace(TOY, rows=4), steps=2, trips=2, turns=1),
}


def measure(size: str) -> Report:
    """Fill a report with all figures of a step; `size` is `full` or `toy`."""
    report, what = Report(), SIZES[size]
    report.row("machine", cores=os.cpu_count(), torch=torch.__version__, model=str(what.shape))
    with threads_of_torch(THREADS):
        _steps(report, what)
    _wire(report, what)
    measure_overlap(report, size)
    return report


# --- steps ----------------------------------------------------------------------------------------


def _steps(report: Report, what: Size) -> None:
    """Measure steps per second, compare the losses, and count the transfers of a step."""
    shape = what.shape
    model = shape.whole()
    whole = ClientTrainer(model, NoTrunk(model, client=name_of(0)), shape.run)
    losses: dict[str, list[float]] = {"split": [], "whole": []}
    with _split(shape) as (split, trunk, link), stages(shape, THREADS) as pipeline:
        measures: dict[str, Callable[[], float]] = {
            "split": partial(_per_second, split, what, losses["split"], trunk.gradients),
            "whole": partial(_per_second, whole, what, losses["whole"], lambda: None),
            "pipelining": lambda: what.steps / pipeline.seconds(what.steps),
        }
        found = in_turns(what.turns, measures)
        # One more step, so that the counts are those of a single step.
        link.forget()
        split.step([shape.batch()])
        _transfers(report, link)
    for name, values in found.items():
        report.spread("steps_per_s", values, by=name)
    report.ratio("split / pipelining", found["split"], found["pipelining"])
    report.figures["step_ratio"] = report.ratio("split / whole", found["split"], found["whole"])
    differ = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    report.row("losses", identical=losses["split"] == losses["whole"], largest_difference=differ)


@contextmanager
def _split(shape: Shape) -> Iterator[tuple[ClientTrainer, RemoteTrunk, WatchedLink]]:
    """Open a session of a client with a trunk in another process."""
    with process(trunk_server, shape, threads=THREADS) as server:
        address, token = server.ask("address"), server.ask("token", name_of(0))
        with closing(WatchedLink(GrpcLink(address, token=token, wire=shape.run.wire))) as link:
            model = shape.client()
            trunk = RemoteTrunk(link, model, shape.run, client=name_of(0))
            connect(model, trunk)
            with trunk.session():
                yield ClientTrainer(model, trunk, shape.run), trunk, link


def _transfers(report: Report, link: WatchedLink) -> None:
    """Report the tensors, bytes and requests of one step."""
    num_tensors = sum(seen.num_tensors for seen in link.seen)
    num_bytes = sum(seen.num_bytes for seen in link.seen)
    requests = Counter(type(seen.request).__name__ for seen in link.seen)
    report.row("a step", tensors=num_tensors, bytes=num_bytes, requests=dict(requests))
    report.figures["transfers_per_step"] = num_tensors


def _per_second(
    trainer: ClientTrainer, what: Size, losses: list[float], finish: Callable[[], object]
) -> float:
    """Return steps per second; `finish` waits until the trunk has finished them too."""
    batch = what.shape.batch()
    began = perf_counter()
    losses += [trainer.step([batch]).loss for _ in range(what.steps)]
    finish()
    return what.steps / (perf_counter() - began)


# --- its wire -------------------------------------------------------------------------------------


def _wire(report: Report, what: Size) -> None:
    """Measure the four tensors of a step, two round trips, in the stack and the naive design."""
    shape = what.shape
    with talkers(shape, WireSpec()) as (client,):

        def seconds(kind: str) -> float:
            spans = client.ask(kind, shape.rows, shape.tokens, 2 * what.trips)
            total: float = spans[-1][1] - spans[0][0]
            return total / what.trips

        kinds = ("stack", "unary", "naive")
        found = in_turns(what.turns, {kind: partial(seconds, kind) for kind in kinds})
    for kind, values in found.items():
        report.spread("wire_s_per_step", values, by=kind)
    report.figures["naive_wire_ratio"] = report.ratio(
        "naive / stack", found["naive"], found["stack"]
    )
