"""Faults of the network between clients and their trunk: no number may show that there were any."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
from torch import Tensor
from transformers import PretrainedConfig

from fedsplit.client.stats import FitStats
from fedsplit.errors import ProtocolError
from fedsplit.spec import PolicySpec, WireSpec
from fedsplit.transport.client import GrpcLink
from fedsplit.transport.server import GrpcServer
from fedsplit.wire.messages import CloseRequest, ForwardRequest, Request
from simulations.proxy import Proxy, proxied
from tests.core.worlds import Member, World, batch, same, small_run, wait_until, world
from tests.edge.disturbed import FAULTS, DisturbedLink

STEPS = 8


@contextmanager
def federation(
    config: PretrainedConfig,
    clients: int,
    *,
    reset_every: int = 0,
    deadline_s: float = 30.0,
    micro_batches: int = 1,
    link_class: Callable[..., GrpcLink] = GrpcLink,
) -> Iterator[tuple[World, Proxy]]:
    """A served trunk and its clients, a proxy between them."""
    wire = WireSpec(budget_s=60.0, call_deadline_s=20.0)
    run = small_run(wire=wire, policy=PolicySpec(deadline_s=deadline_s))
    run = replace(run, train=replace(run.train, batch_size=4, micro_batches=micro_batches))
    with ExitStack() as stack:
        here = stack.enter_context(world(config, run))
        limits = here.service.limits
        server = GrpcServer(here.service, wire=wire, limits=limits, max_clients=2 * clients)
        stack.callback(server.stop)
        proxy = stack.enter_context(proxied(server.start(), reset_every))
        for name in (f"client-{i}" for i in range(clients)):
            link = link_class(proxy.address, token=here.service.admit(name), wire=wire)
            here.add(name, stack.enter_context(closing(link)))
        yield here, proxy


@dataclass(frozen=True)
class Outcome:
    """All numbers of a training."""

    stats: list[FitStats]
    version: int
    trunk: dict[str, Tensor]
    ends: list[dict[str, Tensor]]

    def equals(self, other: "Outcome") -> bool:
        """Whether nothing differs, not in one bit."""
        told = (self.stats, self.version) == (other.stats, other.version)
        ends = zip(self.ends, other.ends, strict=True)
        return told and same(self.trunk, other.trunk) and all(same(a, b) for a, b in ends)


def fit(member: Member, number: int) -> FitStats:
    seeds = range(100 * number, 100 * number + STEPS)
    groups = ([batch(i, rows=4), batch(i + 50, rows=3, pad=3)] for i in seeds)
    return member.trainer.fit(groups)


def train(here: World) -> Outcome:
    """All clients at once, to the end."""
    members = list(here.members.values())
    names = list(here.members)
    here.service.expect(names, round=0, at_once=len(names), close_after=len(names))
    with ThreadPoolExecutor(len(members)) as pool:
        stats = list(pool.map(fit, members, range(len(members))))
    ends = [dict(member.model.named_parameters()) for member in members]
    return Outcome(stats, here.service.engine.version, here.trunk_weights(), ends)


@pytest.fixture
def config(tiny_gpt2) -> PretrainedConfig:
    """With dropout, so that a repeated forward shows if it drops anything else."""
    return tiny_gpt2(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[int, int], Outcome]:
    """Outcomes without faults, by the number of clients and of micro-batches."""
    return {}


@pytest.fixture
def undisturbed(
    config: PretrainedConfig, outcomes: dict[tuple[int, int], Outcome]
) -> Callable[..., Outcome]:
    """Gives the outcome without faults, which is computed once."""

    def outcome(clients: int, micro_batches: int = 1) -> Outcome:
        key = clients, micro_batches
        if key not in outcomes:
            with federation(config, clients, micro_batches=micro_batches) as (here, _):
                outcomes[key] = train(here)
        return outcomes[key]

    return outcome


@pytest.mark.parametrize(("clients", "reset_every"), [(1, 50), (1, 17), (3, 50)])
def test_connections_that_are_reset_change_no_number(
    config: PretrainedConfig,
    undisturbed: Callable[..., Outcome],
    clients: int,
    reset_every: int,
) -> None:
    expected = undisturbed(clients)
    with federation(config, clients, reset_every=reset_every) as (here, proxy):
        got = train(here)
    assert proxy.resets > 0
    assert got.version == STEPS
    assert got.equals(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("micro_batches", "clients", "reset_every"), [(2, 1, 17), (2, 1, 50), (4, 1, 13), (2, 3, 50)]
)
def test_connections_that_are_reset_change_no_number_of_micro_batches(
    config: PretrainedConfig,
    undisturbed: Callable[..., Outcome],
    micro_batches: int,
    clients: int,
    reset_every: int,
) -> None:
    expected = undisturbed(clients, micro_batches)
    broken = federation(config, clients, micro_batches=micro_batches, reset_every=reset_every)
    with broken as (here, proxy):
        got = train(here)
    assert proxy.resets > 0
    assert got.version == STEPS
    assert got.equals(expected)


class Forgetful(GrpcLink):
    """A link whose trunk drops the session before every seventh forward, up to the fifth one."""

    forwards = 0

    def stream(self) -> Any:
        stream = super().stream()
        begin = type(stream).begin

        def forget(request: Request[Any]) -> Any:
            if isinstance(request, ForwardRequest):
                self.forwards += 1
                if self.forwards in (7, 14, 21, 28, 35):
                    begin(stream, CloseRequest(session=request.session))()
            return begin(stream, request)

        stream.begin = forget
        return stream


def test_sessions_that_are_lost_change_no_number_of_micro_batches(
    config: PretrainedConfig, undisturbed: Callable[..., Outcome]
) -> None:
    expected = undisturbed(1, 2)
    with federation(config, 1, micro_batches=2, link_class=Forgetful) as (here, _):
        got = train(here)
    assert got.stats[0].repeated > 0
    assert got.equals(replace(expected, stats=got.stats))
    assert got.stats[0].loss == expected.stats[0].loss


TRAINED = {"OpenRequest", "ForwardRequest", "BackwardRequest", "StepRequest", "CloseRequest"}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_every_message_changes_no_number(
    config: PretrainedConfig, undisturbed: Callable[..., Outcome], fault: str
) -> None:
    """A copy of an Open takes the place of the client's session, whose step is then repeated."""
    expected = undisturbed(3)
    with federation(config, 3, link_class=partial(DisturbedLink, fault)) as (here, _):
        got = train(here)
        links = [member.trunk._link for member in here.members.values()]
        assert all(link.phases == TRAINED for link in links)
        wait_until(lambda: here.service.num_sessions == 0)
        assert (here.service.engine.stashed_bytes, here.service.engine.num_waiting) == (0, 0)
    stats = [replace(each, repeated=0) for each in got.stats]
    assert replace(got, stats=stats).equals(expected)


def test_a_network_that_stands_still_changes_no_number(
    config: PretrainedConfig, undisturbed: Callable[..., Outcome]
) -> None:
    expected = undisturbed(3)
    with federation(config, 3) as (here, proxy):
        threading.Timer(0.05, proxy.hold).start()
        threading.Timer(0.15, proxy.heal).start()
        got = train(here)
    assert got.equals(expected)


def test_clients_that_go_while_they_wait_at_the_barrier_leave_nothing_behind(
    config: PretrainedConfig,
) -> None:
    with federation(config, 2, deadline_s=0.5) as (here, _):
        alice, bob = here.members.values()
        engine = here.service.engine
        alice.trunk.open(), bob.trunk.open()
        bob.model(batch(1).inputs["input_ids"])  # a forward that never gets its backward
        alice.trainer.step([batch(0)])
        with ThreadPoolExecutor(1) as pool:
            parked = pool.submit(alice.trainer.step, [batch(2)])
            while not engine.num_waiting:
                time.sleep(0.01)
            for member in (alice, bob):
                member.trunk._link.close()
            with pytest.raises(ProtocolError, match="is closed; make a new one"):
                parked.result()
        until = time.monotonic() + 10.0
        while here.service.num_sessions and time.monotonic() < until:
            time.sleep(0.01)
        assert (here.service.num_sessions, engine.stashed_bytes, engine.num_waiting) == (0, 0, 0)
        carol = here.add("carol")
        assert carol.trainer.fit([[batch(3)]]).steps == 1
