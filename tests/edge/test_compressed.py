"""Compressed training: the same over every link, also when requests are repeated."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GPT2Config

from fedsplit.link import Link, LocalLink
from fedsplit.spec import WireSpec
from fedsplit.transport.client import GrpcLink, _max_reply_bytes
from fedsplit.transport.server import GrpcServer
from fedsplit.wire import messages as m
from tests.core.worlds import World, batch, small_run, world

STRONG = WireSpec(
    up="int4:stochastic",
    down="huffman:0.2",
    grad_up="topk:0.2",
    grad_down="huffman:0.9",
    history_bytes=1 << 20,
)
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TINY = GPT2Config(
    n_layer=4, n_embd=16, n_head=2, n_positions=64, vocab_size=64, eos_token_id=0, **QUIET
)
STEPS = 4
Numbers = tuple[list[float], dict[str, torch.Tensor]]


class Twice(Link):
    """Sends what carries tensors a second time, as if the first reply had been lost."""

    def __init__(self, inner: Link) -> None:
        self._inner = inner

    def exchange(self, request: m.Request[m.R]) -> m.R:
        reply = self._inner.exchange(request)
        repeats = isinstance(request, m.ForwardRequest | m.BackwardRequest)
        return self._inner.exchange(request) if repeats else reply

    def close(self) -> None:
        self._inner.close()


@contextmanager
def grpc(here: World) -> Iterator[GrpcLink]:
    limits = here.service.limits
    server = GrpcServer(here.service, wire=here.run.wire, limits=limits, max_clients=2)
    token = here.service.admit("alice")
    try:
        with closing(GrpcLink(server.start(), token=token, wire=here.run.wire)) as link:
            yield link
    finally:
        server.stop()


@contextmanager
def local(here: World) -> Iterator[Link]:
    yield LocalLink(here.service, here.service.admit("alice"))


@contextmanager
def twice(here: World) -> Iterator[Link]:
    with grpc(here) as link:
        yield Twice(link)


def trained(link_to: Any, wire: WireSpec) -> Numbers:
    with world(TINY, small_run(wire=wire)) as here, link_to(here) as link:
        alice = here.add("alice", link)
        with alice.trunk.session():
            losses = [alice.trainer.step([batch(i), batch(i + 1)]).loss for i in range(STEPS)]
        ends = {name: p.detach().clone() for name, p in alice.model.named_parameters()}
        return losses, ends | here.trunk_weights()


@pytest.fixture(scope="module")
def expected() -> Numbers:
    return trained(local, STRONG)


@pytest.mark.parametrize("link_to", [grpc, twice])
def test_every_link_gives_the_same_numbers(link_to: Any, expected: Numbers) -> None:
    losses, weights = trained(link_to, STRONG)
    assert losses == expected[0]
    assert all(weights[name].equal(tensor) for name, tensor in expected[1].items())


def test_a_reply_may_be_longer_than_its_request() -> None:
    wire = WireSpec(up="topk:0.1", grad_up="topk:0.1")
    assert trained(grpc, wire)[0] == trained(local, wire)[0]


def test_what_a_forward_goes_by_does_not_lengthen_its_reply() -> None:
    smashed_BTD = torch.zeros(1, 4, 128)
    plain = m.ForwardRequest(session="s", call=0, training=True, smashed_BTD=smashed_BTD)
    assert _max_reply_bytes(replace(plain, base_BTD=smashed_BTD)) == _max_reply_bytes(plain)


def test_a_repeated_step_gives_the_same_numbers(expected: Numbers) -> None:
    with world(TINY, small_run(wire=STRONG)) as here:
        alice = here.add("alice")
        losses = []
        with alice.trunk.session():
            for i in range(STEPS):
                first_call = alice.trunk.next_call
                alice.trainer.optimizer.zero_grad()
                alice.model(**batch(i).inputs, labels=batch(i).labels).loss.backward()
                alice.trunk.open(first_call=first_call)
                losses.append(alice.trainer.step([batch(i), batch(i + 1)]).loss)
    assert losses == expected[0]
