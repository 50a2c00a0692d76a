"""Promises that hold whatever the clients do: in long runs, in disorder, and with huge gradients.

I1 Every gradient is applied exactly once, or refused. I2 The version only grows. I3 Nothing is
applied that is staler than the policy allows. I7 Every call ends, with a reply or an error of ours.
I8 When the last client is gone, nothing is kept for anyone.
"""

import gc
import os
import random
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config

from fedsplit import errors
from fedsplit.link import LocalLink
from fedsplit.model.checkpoint import model_fingerprint
from fedsplit.spec import PolicySpec, RunSpec, WireSpec
from fedsplit.wire import messages as m
from tests.core.requests import backward_of, step_of
from tests.core.worlds import World, same, small_run, world

WIDTH, ROWS, TOKENS, LR = 8, 2, 4, 0.1
SMALL = 2.0**-12
"""A gradient at which the weights stay where they are, for all that matters."""
CONFIG = GPT2Config(
    n_layer=3, n_embd=WIDTH, n_head=1, n_positions=TOKENS, vocab_size=8, bos_token_id=0,
    eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
MOST_BLOCKS = 3
"""Growth per session, step or client that counts as noise; up to 1.4 were seen."""
BIAS = "transformer.h.1.mlp.c_proj.bias"
"""Added to the trunk's output: its gradient is the sum of that of the output over positions."""


@dataclass
class Client:
    """Sends requests that are named by its session, one after the other."""

    here: World
    name: str
    session: str = ""
    call: int = 0

    def __post_init__(self) -> None:
        self.link = LocalLink(self.here.service, self.here.service.admit(self.name))

    def open(self) -> None:
        run = self.here.run
        request = m.OpenRequest(
            protocol=m.PROTOCOL,
            client=self.name,
            model=model_fingerprint(CONFIG, run.split),
            config=run.fingerprint,
            hidden_size=WIDTH,
            round=0,
            training=True,
        )
        self.session, self.call = self.link.exchange(request).session, 0

    def forward(self, seed: int = 0) -> m.ForwardRequest:
        chance = torch.Generator().manual_seed(seed)
        request = m.ForwardRequest(
            session=self.session,
            call=self.call,
            training=True,
            smashed_BTD=torch.randn(ROWS, TOKENS, WIDTH, generator=chance),
        )
        self.call += 1
        return request

    def step(self, scale: float = SMALL) -> m.StepReply:
        forward = self.forward()
        for request in (forward, backward_of(forward, scale)):
            self.link.exchange(request)
        return self.link.exchange(step_of(forward, num_tokens=TOKENS))

    def close(self) -> None:
        self.link.exchange(m.CloseRequest(session=self.session))


def run_of(policy: PolicySpec, **train: object) -> RunSpec:
    run = small_run(policy=policy, wire=WireSpec(budget_s=10.0))
    return replace(run, train=replace(run.train, local_steps=10_000, **train))


# --- long runs --------------------------------------------------------------------------------


def held() -> dict[str, int]:
    """What this process holds on to."""
    gc.collect()
    return {
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "memory blocks": sys.getallocatedblocks(),
    }


def test_nothing_grows_over_hundreds_of_sessions():
    with world(CONFIG, run_of(PolicySpec())) as here:
        alice, bob = Client(here, "alice"), Client(here, "bob")

        def sessions(number: int) -> dict[str, int]:
            for _ in range(number):
                alice.open()
                alice.step()
                alice.close()
            assert (here.service.num_sessions, here.service.engine.stashed_bytes) == (0, 0)
            return held()

        bob.open()
        bob.close()
        before, after = sessions(50), sessions(400)
    assert here.service.engine.version == 450
    assert after["threads"] <= before["threads"]
    assert after["descriptors"] <= before["descriptors"]
    assert after["memory blocks"] - before["memory blocks"] < MOST_BLOCKS * 400


def test_nothing_grows_over_the_steps_of_a_session():
    with world(CONFIG, run_of(PolicySpec())) as here:
        alice = Client(here, "alice")
        alice.open()
        for _ in range(50):
            alice.step()
        before = held()
        for _ in range(200):
            alice.step()
        after = held()
        alice.close()
        assert (here.service.num_sessions, here.service.engine.stashed_bytes) == (0, 0)
    assert after["threads"] <= before["threads"]
    assert after["descriptors"] <= before["descriptors"]
    assert after["memory blocks"] - before["memory blocks"] < MOST_BLOCKS * 200


def test_clients_that_came_once_leave_nothing_when_they_are_forgotten():
    with world(CONFIG, run_of(PolicySpec())) as here:

        def guests(numbers: range) -> dict[str, int]:
            for number in numbers:
                guest = Client(here, f"guest-{number}")
                guest.open()
                guest.step()
                guest.close()
                assert here.service.forget(guest.name)
            return held()

        before, after = guests(range(50)), guests(range(50, 200))
    assert after["threads"] <= before["threads"]
    assert after["memory blocks"] - before["memory blocks"] < MOST_BLOCKS * 150


# --- disorder ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contribution:
    """A gradient that the trunk took: how large, and from which version for which."""

    scale: float
    staleness: int
    version: int


@dataclass
class Wanderer:
    """A client that sends again, drops, comes back and gives up, as chance has it."""

    client: Client
    chance: random.Random
    taken: list[Contribution] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    refused: int = 0

    def wander(self, moves: int) -> None:
        for _ in range(moves):
            try:
                self.move()
            except errors.FedsplitError:
                self.refused += 1
                self.client.here.service.disconnected(self.client.session)
                self.client.session = ""
        if self.client.session:
            try:
                self.client.close()
            except errors.SessionLost:
                self.refused += 1

    def move(self) -> None:
        chance, client = self.chance, self.client
        if not client.session:
            client.open()
        if chance.random() < 0.15:  # the connection broke; it comes back to its session, or not
            client.here.service.disconnected(client.session)
            if chance.random() < 0.5:
                client.open()
        scales, at = [], []
        for _ in range(chance.choice((1, 1, 2))):
            forward = client.forward(chance.randrange(99))
            at.append(self.exchange(forward).version)
            self.versions.append(at[-1])
            if chance.random() < 0.1:
                client.close()
            scales.append(SMALL * chance.choice((0.5, 1.0, 2.0, -1.0)))
            scale = float("nan") if chance.random() < 0.05 else scales[-1]
            self.exchange(backward_of(forward, scale))
        if chance.random() < 0.1:
            client.open()  # and what was accumulated is gone
            return
        reply = self.exchange(step_of(forward, num_tokens=TOKENS))
        staleness = reply.version - 1 - at[0]
        self.taken.append(Contribution(sum(scales), staleness, reply.version))

    def exchange(self, request: m.Request[m.R]) -> m.R:
        """Send a request, perhaps several times, one after the other or at once."""
        times = self.chance.choice((1, 1, 1, 2, 3))
        if times > 1 and self.chance.random() < 0.5:
            with ThreadPoolExecutor(times) as pool:
                replies = list(pool.map(self.client.link.exchange, [request] * times))
        else:
            replies = [self.client.link.exchange(request) for _ in range(times)]
        return replies[0]


def expected_bias(taken: list[Contribution], policy: PolicySpec) -> float:
    """How far plain SGD moves an entry of the bias if each contribution counts once."""
    by_version = defaultdict(list)
    for each in taken:
        by_version[each.version].append((policy.discount_of(each.staleness), each.scale))
    moved = 0.0
    for given in by_version.values():
        mean = sum(w * s for w, s in given) / sum(w for w, _ in given)
        moved -= LR * mean * ROWS * TOKENS * (given[0][0] if policy.kind == "async" else 1.0)
    return moved


@contextmanager
def finishing(here: World) -> Iterator[None]:
    """A block after which, in bounded time, the service holds nothing (I8)."""
    threads = threading.active_count()
    yield
    engine, end = here.service.engine, time.monotonic() + 20.0
    while here.service.num_sessions or threading.active_count() > threads:
        assert time.monotonic() < end, "a session stays"
        time.sleep(0.005)
    here.service.close()  # what the last one brought about is done
    assert (engine.stashed_bytes, engine.num_waiting, engine.cache_bytes) == (0, 0, 0)


POLICIES = {
    "sync": PolicySpec(kind="sync", deadline_s=0.05),
    "quorum": PolicySpec(kind="quorum", quorum=2, deadline_s=0.05, max_staleness=2),
    "strict quorum": PolicySpec(kind="quorum", quorum=2, late="refuse", deadline_s=0.05),
    "async": PolicySpec(kind="async", deadline_s=0.05, max_staleness=2),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
def test_in_any_schedule_each_gradient_counts_once_or_is_refused(policy, seed):
    with world(CONFIG, run_of(policy)) as here:
        before = here.trunk_weights()[BIAS]
        clients = [
            Wanderer(Client(here, name), random.Random(f"{seed} {name}"))
            for name in ("alice", "bob", "carol")
        ]
        with finishing(here), ThreadPoolExecutor(3) as pool:
            for done in [pool.submit(client.wander, 20) for client in clients]:
                done.result(timeout=60)  # I7
        taken = [each for client in clients for each in client.taken]
        assert len(taken) > 10 and sum(client.refused for client in clients) > 3
        assert here.service.engine.version == len({each.version for each in taken})
        moved = here.trunk_weights()[BIAS] - before
    wanted = torch.full_like(moved, expected_bias(taken, policy))
    torch.testing.assert_close(moved, wanted, rtol=1e-3, atol=1e-6)  # I1
    stalest = policy.max_staleness if policy.late == "discount" and policy.kind != "sync" else 0
    assert all(0 <= each.staleness <= stalest for each in taken)  # I3
    for client in clients:
        assert client.versions == sorted(client.versions)  # I2


# --- gradients that are finite, and far too large ---------------------------------------------


def weights_after(scale: float, **train: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The trunk's weights before and after a step whose gradient is as large as `scale`."""
    with world(CONFIG, run_of(PolicySpec(), **train)) as here:
        before = here.trunk_weights()
        alice = Client(here, "alice")
        alice.open()
        if scale > 1e10:
            with pytest.raises(errors.NonFinite, match="nothing was changed"):
                alice.step(scale)
        else:
            alice.step(scale)
        alice.close()
    return before, here.trunk_weights()


def largest_step(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return max((after[name] - before[name]).abs().max().item() for name in before)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0], ids=["without clipping", "with clipping"])
@pytest.mark.parametrize("scale", [1e18, 1e36, 3e38])
def test_a_gradient_whose_norm_overflows_is_refused_and_changes_nothing(scale, clip_norm):
    assert same(*weights_after(scale, clip_norm=clip_norm))


@pytest.mark.parametrize("scale", [1e6, 1e10])
def test_with_clipping_an_exploding_gradient_moves_no_weight_further_than_the_norm(scale):
    assert 0.0 < largest_step(*weights_after(scale, clip_norm=1.0)) <= LR


def test_without_clipping_an_exploding_gradient_is_applied_as_it_is():
    assert largest_step(*weights_after(1e6)) > 1e5
