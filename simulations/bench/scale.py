"""More than one server: several servers, many clients, idle ones, and a trunk cut over ranks.

Clients have no blocks and always send the same tensors, so that only the trunk is measured. Each
server has one thread of torch. docs/performance.md explains the figures.
"""

import gc
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from time import perf_counter

import psutil
import torch

from fedsplit.client.remote import RemoteTrunk
from fedsplit.console import quiet_libraries
from fedsplit.transport.allocator import give_back
from fedsplit.transport.client import GrpcLink
from fedsplit.transport.server import GrpcServer
from fedsplit.trunk.follower import FollowerService
from fedsplit.trunk.service import TrunkService
from simulations.bench.clients import crowd, empty_client
from simulations.bench.models import GPT2_SMALL, TOY, Shape
from simulations.bench.processes import Answers, Process, process
from simulations.bench.report import Report, in_turns
from simulations.bench.roles import name_of
from simulations.families import random_model
from simulations.sharded import bytes_per_rank
from simulations.tiny import tiny_config

_SECRET = "of-the-servers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The model, the clients of two servers and their steps, few and many clients of one; turns."""

    shape: Shape
    of_two: int
    few: int
    many: int
    steps: int
    turns: int


SIZES = {
    "full": Size(
        shape=replace(GPT2_SMALL, rows=1, tokens=32, lora_rank=8),
        of_two=4,
        few=8,
        many=128,
        steps=8,
        turns=3,
    ),
    "toy": Size(
        shape=replace(TOY, rows=1, tokens=32, lora_rank=2),
        of_two=2,
        few=1,
        many=3,
        steps=2,
        turns=1,
    ),
}


def measure(size: str) -> Report:
    """Fill a report with the figures of scale; `size` is `full` or `toy`."""
    report, what = Report(), SIZES[size]
    report.row("machine", cores=os.cpu_count(), torch=torch.__version__, model=str(what.shape))
    _cores(report, what)
    _servers(report, what)
    _clients(report, what)
    # Ranks are forked, so from a process that has no threads.
    with ProcessPoolExecutor(1, get_context("forkserver")) as pool:
        report.figures["tp_bytes_per_rank"] = pool.submit(_share_of_rank).result()
    return report


# --- two servers ----------------------------------------------------------------------------------


def _cores(report: Report, what: Size) -> None:
    """Compare two processes that pass a trunk's batches with one: what two servers can gain."""
    shape = replace(what.shape, rows=4 * what.shape.rows)
    count = what.of_two * what.steps
    with process(passer, shape) as one, process(passer, shape) as other:
        found = in_turns(
            what.turns,
            {
                "one process": lambda: _passes_per_s([one], count),
                "two processes": lambda: _passes_per_s([one, other], count // 2),
            },
        )
    for name, values in found.items():
        report.spread("passes_per_s", values, by=name)
    report.figures["cores_gain"] = report.ratio(
        "two processes / one", found["two processes"], found["one process"]
    )


def _passes_per_s(passers: list[Process], count: int) -> float:
    for each in passers:
        each.begin("pass", count)
    return float(len(passers) * count / max([each.end() for each in passers]))


def _servers(report: Report, what: Size) -> None:
    """Compare samples per second of two servers with those of one, with the same clients."""
    half = what.of_two // 2
    shape = replace(what.shape, rows=4 * what.shape.rows, clients=what.of_two)
    with process(leader, shape) as first, ExitStack() as stack:
        address = first.ask("address")
        second = stack.enter_context(process(follower, shape, address))
        tokens = [first.ask("token", name_of(i)) for i in range(what.of_two)]
        near = stack.enter_context(process(crowd, shape, address, tokens[:half], False))
        far = {
            "one server": address,
            "two servers": second.ask("address"),
        }
        others = {
            way: stack.enter_context(process(crowd, shape, at, tokens[half:], False, half))
            for way, at in far.items()
        }
        found = in_turns(
            what.turns,
            {
                way: partial(_samples_per_s, [near, other], half, what.steps, shape.rows)
                for way, other in others.items()
            },
        )
    for name, values in found.items():
        report.spread("samples_per_s", values, by=name)
    gain = report.ratio("two servers / one", found["two servers"], found["one server"])
    report.figures["servers_gain"] = gain


def _samples_per_s(crowds: list[Process], count: int, steps: int, rows: int) -> float:
    for each in crowds:
        each.begin("steps", count, steps)
    seconds = max([each.end() for each in crowds])
    return float(len(crowds) * count * steps * rows / seconds)


# --- many clients ---------------------------------------------------------------------------------


def _clients(report: Report, what: Size) -> None:
    """Compare samples per second with many clients to those with few; measure idle clients."""
    shape = replace(what.shape, clients=what.many)
    with process(leader, shape) as server:
        address = server.ask("address")
        tokens = [server.ask("token", name_of(i)) for i in range(what.many)]
        with process(crowd, shape, address, tokens, False) as clients:
            found = in_turns(
                what.turns,
                {
                    # As many samples from few clients as from many.
                    str(count): partial(
                        _samples_per_s, [clients], count, what.many // count, shape.rows
                    )
                    for count in (what.few, what.many)
                },
            )
        for name, values in found.items():
            report.spread("samples_per_s", values, clients=name)
        many, few = found[str(what.many)], found[str(what.few)]
        report.figures["clients_128_of_8"] = report.ratio("many clients / few", many, few)
        with process(idlers, shape, address, tokens) as clients:
            clients.ask("begin", what.few)
            before = server.ask("memory")
            clients.ask("begin", what.many)
            after = server.ask("memory")
    per_client = max(0.0, (after - before) / (what.many - what.few))
    report.row("memory of the trunk's process", few=before, many=after)
    report.figures["idle_client_bytes"] = per_client


# --- ranks ----------------------------------------------------------------------------------------


def _share_of_rank() -> float:
    """Return the share of a trunk's weights that each of two ranks holds."""
    quiet_libraries()
    return bytes_per_rank(random_model(tiny_config("llama", tie_word_embeddings=False)))


# --- the processes --------------------------------------------------------------------------------


@contextmanager
def passer(shape: Shape) -> Iterator[Answers]:
    """Hold a trunk alone; `pass(count)` runs forwards and backwards, and returns the seconds."""
    trunk, smashed_BTD = shape.trunk(), shape.smashed(shape.rows, shape.tokens)
    trained = [p for p in trunk.parameters() if p.requires_grad]

    def passes(count: int) -> float:
        began = perf_counter()
        for _ in range(count):
            given_BTD = smashed_BTD.clone().requires_grad_()
            torch.autograd.grad(trunk.run(given_BTD).sum(), [given_BTD, *trained])
        return perf_counter() - began

    yield {"pass": passes}


@contextmanager
def leader(shape: Shape) -> Iterator[Answers]:
    """Serve a trunk that may have followers; answers `address`, `token` of a client, `memory`."""
    with TrunkService(shape.trunk(), shape.run, servers_token=_SECRET) as service:
        with _served(service, shape) as address:
            memory = partial(_memory, service)
            yield {"address": lambda: address, "token": service.admit, "memory": memory}
            service.followers.close()


@contextmanager
def follower(shape: Shape, of: str) -> Iterator[Answers]:
    """Serve a follower of the leader at an address; answers `address`."""

    def connect() -> GrpcLink:
        return GrpcLink(of, token=_SECRET, wire=shape.run.wire)

    with FollowerService(shape.trunk(), shape.run, connect, _SECRET, name="server-1") as service:
        with _served(service, shape) as address:
            yield {"address": lambda: address}


@contextmanager
def _served(service: TrunkService, shape: Shape) -> Iterator[str]:
    server = GrpcServer(
        service,
        wire=shape.run.wire,
        limits=service.limits,
        max_clients=2 * shape.clients + 4,
        payload_of=service.followers.payload_of,
    )
    try:
        yield server.start()
    finally:
        server.stop()


def _memory(service: TrunkService) -> int:
    """Return the resident bytes of this process, without what its allocator holds in reserve."""
    # Clients have their replies before the trunk has stepped.
    service.engine.run(gc.collect).result()
    give_back()
    resident: int = psutil.Process().memory_info().rss
    return resident


@contextmanager
def idlers(shape: Shape, address: str, tokens: list[str]) -> Iterator[Answers]:
    """Run clients that take a step at once and then do nothing, with their sessions open.

    Its answer `begin(count)` has `count` clients do so; those that have a session keep it.
    """
    model = shape.client()
    with ExitStack() as stack:
        steps: list[Callable[[], object]] = []

        def begin(count: int) -> None:
            for i in range(len(steps), count):
                link = GrpcLink(address, token=tokens[i], wire=shape.run.wire)
                stack.enter_context(closing(link))
                trunk = RemoteTrunk(link, model, shape.run, client=name_of(i))
                trunk.open()
                steps.append(empty_client(shape, trunk))
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(lambda step: step(), steps))

        yield {"begin": begin}
