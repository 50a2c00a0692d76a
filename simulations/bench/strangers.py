"""What attackers take from a server, and what an honest client beside them notices.

Shapes: B sequences, T tokens, D hidden width. The attackers without a token open calls whose body
never comes, and send what protobuf or a codec would expand many times. The one with a token opens
streams and says nothing on them. Server, attacker and honest client are processes on one machine.
So an attacker also takes CPU time from the others, which a stranger on another machine does not.
The honest client's p99 is therefore also measured beside a process that takes as much CPU time as
the attacker, and does not connect. docs/security.md explains the figures.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import psutil
import torch

from fedsplit.client.remote import RemoteTrunk
from fedsplit.spec import WireSpec
from fedsplit.transport.client import GrpcLink
from simulations.bench.attackers import ATTACKS, attacker
from simulations.bench.echo import hollow_server
from simulations.bench.models import TOY, Shape
from simulations.bench.processes import Answers, Process, process
from simulations.bench.report import Report, in_turns

MIB = 1 << 20
_SETTLE_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The seconds of an attack on memory, the round trips of a turn, and the turns."""

    seconds: float
    trips: int
    turns: int


SIZES = {
    "full": Size(seconds=4.0, trips=250, turns=5),
    "toy": Size(seconds=0.5, trips=20, turns=1),
}


def measure(size: str) -> Report:
    """Fill a report with the figures of all attacks; `size` is `full` or `toy`."""
    report, what = Report(), SIZES[size]
    report.row("machine", cores=os.cpu_count())
    with ExitStack() as stack:
        server = stack.enter_context(process(watched_server, TOY))
        address = server.ask("address")
        honest = stack.enter_context(process(client, TOY, address, server.ask("token", "honest")))
        hostile = stack.enter_context(process(attacker, address, server.ask("token", "hostile")))
        _memory(report, server, hostile, what)
        _latency(report, server, honest, hostile, what)
        report.figures["replies_changed"] = float(honest.ask("changed"))
    return report


# --- processes ------------------------------------------------------------------------------------


@contextmanager
def watched_server(shape: Shape) -> Iterator[Answers]:
    """Serve a trunk without blocks; `begin` and `grown` measure the MiB of a time's peak."""
    process, before = psutil.Process(), 0

    def begin() -> None:
        nonlocal before
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
        before = process.memory_info().rss

    def grown() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024 - before / MIB

    with hollow_server(shape, WireSpec()) as answers:
        yield {**answers, "begin": begin, "grown": grown}


@contextmanager
def client(shape: Shape, address: str, token: str) -> Iterator[Answers]:
    """Run an honest client; `p99` is that of some round trips in milliseconds."""
    smashed_BTD, num_changed = shape.smashed(1, 32), 0
    with closing(GrpcLink(address, token=token, wire=WireSpec())) as link:
        trunk = RemoteTrunk(link, shape.client(), shape.run, client="honest")

        def p99_ms(trips: int) -> float:
            nonlocal num_changed
            times_ms = []
            for _ in range(trips):
                began = time.perf_counter()
                out_BTD = trunk(smashed_BTD)
                times_ms.append(1000 * (time.perf_counter() - began))
                num_changed += not out_BTD.equal(expected_BTD)
            return quantiles(times_ms, n=100)[-1]

        with trunk.session(training=False), torch.no_grad():
            expected_BTD = trunk(smashed_BTD)
            yield {"p99": p99_ms, "changed": lambda: num_changed}


# --- measurements ---------------------------------------------------------------------------------


def _memory(report: Report, server: Process, hostile: Process, what: Size) -> None:
    """Measure the server's peak for each MiB that is sent without a token."""
    ratios = []
    for name in _without_token():
        # The first time, threads and buffers are made that stay.
        for is_counted in (False, True):
            server.ask("begin")
            with _beside(hostile, "start", name) as taken:
                time.sleep(what.seconds if is_counted else what.seconds / 2)
        grown = server.ask("grown")
        report.row("server's memory", attack=name, sent_mib=taken["mib"], grown_mib=grown)
        if taken["mib"]:
            ratios.append(grown / taken["mib"])
    report.figures["memory_per_mib"] = max(ratios)


def _latency(
    report: Report, server: Process, honest: Process, hostile: Process, what: Size
) -> None:
    """Measure the honest client's p99 under each attack, over that in calm phases between."""
    held, taken = [0], {"core": 0.0}

    def p99_ms() -> float:
        found: float = honest.ask("p99", what.trips)
        return found

    def under(name: str) -> float:
        nonlocal taken
        with _beside(hostile, "start", name) as taken:
            found = p99_ms()
            if name in _without_token():
                usage: dict[str, Any] = server.ask("usage")
                held.append(usage["streams"] + usage["calls"] - 1)  # one stream is the honest one
        return found

    def computing() -> float:
        with _beside(hostile, "compute", taken["core"]):
            return p99_ms()

    for name in ATTACKS:
        phases: dict[str, Callable[[], float]] = {
            "alone": p99_ms,
            "attacked": partial(under, name),
            "computing": computing,
        }
        found = in_turns(what.turns, phases)
        for phase, values in found.items():
            report.spread("p99_ms", values, attack=name, phase=phase)
        report.row("attacker's share of a core", attack=name, share=taken["core"])
        for phase, figure in (("attacked", f"p99_{name}"), ("computing", f"p99_as_busy_{name}")):
            report.figures[figure] = report.ratio(
                "p99 / alone", found[phase], found["alone"], attack=name, phase=phase
            )
    report.figures["slots_held"] = float(max(held))


@contextmanager
def _beside(hostile: Process, what: str, value: str | float) -> Iterator[dict[str, float]]:
    """A block beside an attacker at work.

    Afterwards the result has the MiB that it sent, and the share of a core that it took.
    """
    taken: dict[str, float] = {}
    hostile.ask(what, value)
    time.sleep(_SETTLE_S)
    yield taken
    taken["mib"], taken["core"] = hostile.ask("stop")
    time.sleep(_SETTLE_S)


def _without_token() -> list[str]:
    return [name for name, attack in ATTACKS.items() if not attack.has_token]
