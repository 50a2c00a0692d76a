"""The speed of a step in micro-batches against a step in whole batches.

Client and trunk are processes with one thread each, so that each has a core of its own. A second
measurement adds a latency to every exchange.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.data.batches import Batch
from fedsplit.model import ClientPart, connect
from fedsplit.transport.client import GrpcLink
from simulations.bench.links import DelayedLink
from simulations.bench.models import GPT2_SMALL, TOY, Shape
from simulations.bench.processes import Process, process, threads_of_torch
from simulations.bench.report import Report, in_turns
from simulations.bench.roles import name_of, trunk_server

NUMBERS = (1, 2, 4)
LATENCIES = {"micro_batch_gain": 0.0, "micro_batch_gain_50ms": 0.05}
"""The latency of an exchange in seconds, by figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The model, whose trunk is half of the work, the steps in a turn, and the turns."""

    shape: Shape
    steps: int
    turns: int


SIZES = {
    "full": Size(shape=replace(GPT2_SMALL, rows=4, tokens=128), steps=1, turns=5),
    "toy": Size(shape=replace(TOY, rows=4), steps=1, turns=1),
}


def measure_overlap(report: Report, size: str) -> None:
    """Measure steps/s with each number of micro-batches; the figures are of 2 over 1."""
    what = SIZES[size]
    shapes = {number: replace(what.shape, micro_batches=number) for number in NUMBERS}
    with threads_of_torch(1), ExitStack() as stack:
        model = what.shape.client()
        servers = {
            number: stack.enter_context(process(trunk_server, each, threads=1))
            for number, each in shapes.items()
        }
        for figure, latency_s in LATENCIES.items():
            with ExitStack() as sessions:
                measures: dict[str, Callable[[], float]] = {}
                for number, each in shapes.items():
                    client = _client(model, each, servers[number], latency_s)
                    trainer, trunk = sessions.enter_context(client)
                    measures[str(number)] = partial(
                        _per_second, model, trainer, trunk, each.batch(), what.steps
                    )
                found = in_turns(what.turns, measures)
            report.figures[figure] = _gain(report, found, latency_s)


def _gain(report: Report, found: dict[str, list[float]], latency_s: float) -> float:
    which = {"latency_ms": round(1000 * latency_s)}
    for number, values in found.items():
        report.spread("steps_per_s", values, micro_batches=int(number), **which)
    gains = {
        number: report.ratio(f"micro_batches {number} / 1", values, found["1"], **which)
        for number, values in found.items()
        if number != "1"
    }
    return gains["2"]


@contextmanager
def _client(
    model: ClientPart, shape: Shape, server: Process, latency_s: float
) -> Iterator[tuple[ClientTrainer, RemoteTrunk]]:
    """Open a session with a trunk, and yield a trainer of the model and the trunk."""
    address, token = server.ask("address"), server.ask("token", name_of(0))
    with closing(GrpcLink(address, token=token, wire=shape.run.wire)) as near:
        link = DelayedLink(near, latency_s) if latency_s else near
        trunk = RemoteTrunk(link, model, shape.run, client=name_of(0))
        with trunk.session():
            yield ClientTrainer(model, trunk, shape.run), trunk


def _per_second(
    model: ClientPart, trainer: ClientTrainer, trunk: RemoteTrunk, batch: Batch, steps: int
) -> float:
    """Return steps per second, measured until the trunk has finished the last step too."""
    # All variants share one client model, so each turn connects its own trunk.
    connect(model, trunk)
    began = perf_counter()
    for _ in range(steps):
        trainer.step([batch])
    # The reply to a step may arrive before the trunk has taken it; this call waits for it.
    trunk.gradients()
    return steps / (perf_counter() - began)
