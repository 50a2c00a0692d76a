"""The round trips per second and the latency of the whole stack, against bare gRPC.

The stack is a client's `RemoteTrunk`, codec, link, server, session, service and engine, with a
trunk that returns its input. The reference is one unary call with the same bytes up and down, and
no serializer. Client, stack and reference are processes on one machine, with one thread each.
docs/performance.md explains the figures.
"""

import math
import os
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory

from fedsplit.spec import WireSpec
from simulations.bench.certificate import self_signed
from simulations.bench.echo import talkers
from simulations.bench.models import Shape
from simulations.bench.processes import Process
from simulations.bench.report import Report, in_turns

KIB = 1 << 10
KINDS = ("stack", "unary", "stream")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Messages of `num_bytes` each way, `trips` round trips per turn; `figure` names the ratio."""

    name: str
    num_bytes: int
    trips: int
    figure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The loads of one client, the load of several clients at once, their number, and the turns."""

    loads: tuple[Load, ...]
    crowd: Load
    clients: int
    turns: int


FULL = Size(
    loads=(
        Load(name="3 KiB", num_bytes=3 * KIB, trips=300),
        Load(name="128 KiB", num_bytes=128 * KIB, trips=200, figure="wire_ratio_128k"),
        Load(name="1.5 MiB", num_bytes=1536 * KIB, trips=60, figure="wire_ratio_1536k"),
        Load(name="12 MiB", num_bytes=12288 * KIB, trips=10, figure="wire_ratio_12m"),
        Load(name="64 MiB", num_bytes=65536 * KIB, trips=3, figure="wire_ratio_64m"),
    ),
    crowd=Load(name="256 KiB", num_bytes=256 * KIB, trips=60, figure="wire_ratio_5c"),
    clients=5,
    turns=7,
)


def _toy(load: Load) -> Load:
    return replace(load, num_bytes=max(KIB, load.num_bytes // 32 // KIB * KIB), trips=2)


SIZES = {
    "full": FULL,
    "toy": Size(loads=tuple(map(_toy, FULL.loads)), crowd=_toy(FULL.crowd), clients=2, turns=1),
}
SHAPE = Shape(blocks=3, hidden=256, heads=1, vocabulary=64, split="1/1/1", tokens=8192)
BYTES_PER_TOKEN = 4 * SHAPE.hidden
"""One KiB; the largest message, 8 rows of 8192 tokens, has 64 MiB."""


def measure(size: str) -> Report:
    """Fill a report with all figures of the wire; `size` is `full` or `toy`."""
    report, what = Report(), SIZES[size]
    report.row("machine", cores=os.cpu_count(), grpc=version("grpcio"))
    with TemporaryDirectory() as folder:
        wires = {
            "tcp": WireSpec(),
            "unix": WireSpec(bind=f"unix:{folder}/"),
            "tls": self_signed(Path(folder), "trunk"),
        }
        for way, wire in wires.items():
            with talkers(SHAPE, wire) as (client,):
                for load in what.loads:
                    _alone(report, client, load, way, what.turns)
        with talkers(SHAPE, wires["tcp"], what.clients) as clients:
            _together(report, clients, what.crowd, what.turns)
    return report


# --- one client -----------------------------------------------------------------------------------


def _alone(report: Report, client: Process, load: Load, way: str, turns: int) -> None:
    """Measure one client's round trips; only those over TCP are figures."""
    # One entry per turn, with the turn that warms up, which is left out below.
    trips: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def per_second(kind: str) -> float:
        spans = client.ask(kind, *_shape(load), load.trips)
        trips[kind].append(median(end - begin for begin, end in spans))
        total_s: float = spans[-1][1] - spans[0][0]
        return load.trips / total_s

    of = {"way": way, "size": load.name}
    found = in_turns(turns, {kind: partial(per_second, kind) for kind in KINDS})
    for kind in KINDS:
        report.spread("round_trips_per_s", found[kind], by=kind, **of)
    ratio = report.ratio("stack / unary", found["stack"], found["unary"], **of)
    report.ratio("stack / stream", found["stack"], found["stream"], **of)
    latency = report.ratio(
        "median latency: stack / unary", trips["stack"][1:], trips["unary"][1:], **of
    )
    if way == "tcp":
        report.figures |= {load.figure: ratio} if load.figure else {"latency_ratio_3k": latency}


def _shape(load: Load) -> tuple[int, int]:
    """Return the rows and tokens of a message, with as many rows as divide its tokens."""
    tokens = load.num_bytes // BYTES_PER_TOKEN
    rows = math.gcd(SHAPE.rows, tokens)
    return rows, tokens // rows


# --- several --------------------------------------------------------------------------------------


def _together(report: Report, clients: list[Process], load: Load, turns: int) -> None:
    """Measure clients that each send the next message when the reply to the last has arrived."""
    seconds: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}

    def per_second(kind: str) -> float:
        for client in clients:
            client.begin(kind, *_shape(load), load.trips)
        spans = [span for client in clients for span in client.end()]
        seconds[kind].append([end - begin for begin, end in spans])
        total_s: float = max(end for _, end in spans) - min(begin for begin, _ in spans)
        return len(spans) / total_s

    of = {"clients": len(clients), "size": load.name}
    found = in_turns(turns, {kind: partial(per_second, kind) for kind in KINDS})
    for kind in KINDS:
        report.spread("round_trips_per_s", found[kind], by=kind, **of)
        every = [1000 * each for turn in seconds[kind][1:] for each in turn]
        p99_ms = quantiles(every, n=100)[-1]
        report.row("latency_ms", by=kind, **of, median=median(every), p99=p99_ms)
        if kind == "stack":
            report.figures["p99_ms_5c"] = p99_ms
    report.figures["requests_per_s_5c"] = median(found["stack"])
    report.figures[load.figure] = report.ratio(
        "stack / unary", found["stack"], found["unary"], **of
    )
    report.ratio("stack / stream", found["stack"], found["stream"], **of)
