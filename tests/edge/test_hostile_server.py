"""A hostile server: a client refuses what no trunk computes, and keeps its weights as they were."""

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsplit.client.following import Follower
from fedsplit.errors import (
    BadTensor,
    FedsplitError,
    GradExploded,
    Internal,
    NonFinite,
    Overloaded,
    ProtocolError,
)
from fedsplit.link import LocalLink
from fedsplit.spec import WireSpec
from fedsplit.transport.client import GrpcLink
from fedsplit.wire import messages as m
from tests.core.generating import prompt, scene
from tests.core.worlds import batch, same, small_run, world
from tests.edge.hostile_server import Alter, HostileService, hostile_server, to

BOUNDED = small_run(train=replace(small_run().train, clip_norm=1.0, optimizer="adamw", lr=1e-3))
OUT, GRAD, STEP, OPEN = m.ForwardReply, m.BackwardReply, m.StepReply, m.OpenReply
STATE, INFO = m.TrainingStateReply, m.ServiceInfoReply


def filled(value: float) -> Callable[[Tensor], Tensor]:
    """A tensor of one value, as large as another."""
    return lambda tensor: torch.full_like(tensor, value)


def one(value: float) -> Callable[[Tensor], Tensor]:
    """The tensor, with its last entry changed."""

    def changed(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[..., -1] = value
        return tensor

    return changed


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


TRAINING: list[tuple[str, Alter, type[FedsplitError], str]] = [
    (
        "output NaN",
        to(OUT, trunk_out_BTD=one(math.nan)),
        NonFinite,
        "trunk_out holds .* NaN or Inf",
    ),
    ("output 1e38", to(OUT, trunk_out_BTD=one(1e38)), NonFinite, "values up to 1e.38"),
    ("output shape", to(OUT, trunk_out_BTD=torch.ones(2, 3, 4)), BadTensor, "answered trunk_out"),
    ("output dtype", to(OUT, trunk_out_BTD=Tensor.double), BadTensor, "answered trunk_out float64"),
    ("version", to(OUT, version=-1), ProtocolError, "version='-1'"),
    ("no gradient", to(GRAD, grad_smashed_BTD=None), ProtocolError, "without grad_smashed"),
    ("gradient Inf", to(GRAD, grad_smashed_BTD=one(math.inf)), NonFinite, "grad_smashed holds"),
    ("gradient shape", to(GRAD, grad_smashed_BTD=torch.ones(1)), BadTensor, "grad_smashed"),
    ("gradient 1e38", to(GRAD, grad_smashed_BTD=filled(1e38)), NonFinite, "squared gradient norm"),
    ("norm below 0", to(GRAD, trunk_sq_norm=-1.0), NonFinite, "no squared norm of gradients"),
    ("norm NaN", to(GRAD, trunk_sq_norm=math.nan), NonFinite, "no squared norm of gradients"),
    ("norm 1e300", to(GRAD, trunk_sq_norm=1e300), NonFinite, "no squared norm of gradients"),
    ("norm 1e30", to(GRAD, trunk_sq_norm=1e30), GradExploded, "trunk reports a gradient norm of"),
    ("session", to(OPEN, session="../s\x1b[2J"), ProtocolError, "session="),
    ("autocast", to(OPEN, autocast="float8"), ProtocolError, "autocast='float8'"),
    ("error", lambda *_: (_ for _ in ()).throw(Internal("broken")), Internal, "broken"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alter", "error", "text"), [case[1:] for case in TRAINING], ids=[case[0] for case in TRAINING]
)
def test_a_client_that_trains_refuses_the_reply_and_keeps_its_weights(
    alter, error, text, tiny_llama
):
    with world(tiny_llama(), BOUNDED) as here:
        service = HostileService(here.service, alter)
        alice = here.add("alice", LocalLink(service, here.service.admit("alice")))
        before, moments = weights_of(alice.model), alice.trainer.optimizer.state()
        with pytest.raises(error, match=text):
            alice.trainer.fit([batch(seed)] for seed in range(9))
        assert same(weights_of(alice.model), before)
        assert alice.trainer.optimizer.state() == moments == {}
        assert alice.trainer.steps == 0
        # Three attempts at most, each with an open, a forward, a backward and a close.
        assert len(service.handled) <= 12


def test_a_steps_version_out_of_range_is_refused_before_the_client_steps(tiny_llama):
    with world(tiny_llama(), BOUNDED) as here:
        service = HostileService(here.service, to(STEP, version=2**64 - 1))
        alice = here.add("alice", LocalLink(service, here.service.admit("alice")))
        before = weights_of(alice.model)
        with pytest.raises(ProtocolError, match="version='18446744073709551615'"):
            alice.trainer.fit([[batch()]])
        assert same(weights_of(alice.model), before)


@pytest.mark.parametrize(
    ("norm", "error"), [(-1.0, NonFinite), (1e300, NonFinite), (1e30, GradExploded)]
)
def test_a_loop_of_ones_own_is_not_frozen_by_a_norm(norm, error, tiny_llama):
    with world(tiny_llama(), BOUNDED) as here:
        service = HostileService(here.service, to(GRAD, trunk_sq_norm=norm))
        alice = here.add("alice", LocalLink(service, here.service.admit("alice")))
        optimizer = torch.optim.SGD(alice.model.parameters(), lr=0.1)
        before = weights_of(alice.model)
        alice.trunk.open()
        with alice.trunk.follow(optimizer) as follower:
            assert isinstance(follower, Follower)
            given = batch()
            with pytest.raises(error):
                alice.model(**given.inputs, labels=given.labels).loss.backward()
                torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
                optimizer.step()
        assert same(weights_of(alice.model), before)


def test_an_overflow_of_float16_is_no_fault_of_the_trunk(tiny_llama):
    """Infinite gradients lower the loss scale, as those of the unsplit model do."""
    run = replace(BOUNDED, model=replace(BOUNDED.model, autocast="float16"))
    calls = iter([math.inf, 1.0, 1.0])

    def alter(_: m.Request[Any], reply: m.Reply) -> m.Reply:
        if not isinstance(reply, GRAD):
            return reply
        grad_BTD = reply.grad_smashed_BTD * next(calls)
        return replace(reply, grad_smashed_BTD=grad_BTD)

    with world(tiny_llama(), run) as here:
        service = HostileService(here.service, alter)
        alice = here.add("alice", LocalLink(service, here.service.admit("alice")))
        scale = alice.trainer.loss_scale.value
        stats = alice.trainer.fit([batch(seed)] for seed in range(3))
        assert (stats.steps, stats.skipped) == (2, 1)
        assert alice.trainer.loss_scale.value == scale / 2


# --- generation -------------------------------------------------------------------------------


def entries(change: Callable[[list[m.KVCacheEntry]], list[m.KVCacheEntry]]) -> Alter:
    return to(m.GenerateReply, entries=lambda found: tuple(change(list(found))))


def keys(change: Callable[[Tensor], Tensor]) -> Alter:
    return entries(lambda found: [replace(e, keys_BHTE=change(e.keys_BHTE)) for e in found])


A_BLOCK = m.KVCacheEntry(block=1, keys_BHTE=torch.ones(1, 1, 1, 1), values_BHTE=torch.ones(1))
GENERATING: list[tuple[str, str, Alter, type[FedsplitError], str]] = [
    ("NaN", "server", to(m.GenerateReply, trunk_out_BTD=one(math.nan)), NonFinite, "NaN or Inf"),
    ("1e38", "server", to(m.GenerateReply, trunk_out_BTD=filled(1e38)), NonFinite, "up to 1e.38"),
    ("entries", "server", entries(lambda _: [A_BLOCK]), ProtocolError, "only kv=client asks for"),
    ("no entries", "client", entries(lambda _: []), ProtocolError, "keys and values of blocks"),
    ("a block twice", "client", entries(lambda e: e + e), ProtocolError, "each block is needed"),
    ("keys NaN", "client", keys(one(math.nan)), NonFinite, "keys_BHTE of block .* NaN or Inf"),
    ("keys shape", "client", keys(lambda t: t.repeat(1, 1, 9, 1)), BadTensor, "keys_BHTE of block"),
    ("keys dtype", "client", keys(Tensor.double), BadTensor, "keys_BHTE of block .* float64"),
    (
        "a block's number",
        "client",
        entries(lambda found: [replace(e, block=2**63) for e in found[:1]]),
        ProtocolError,
        "block=",
    ),
]


@pytest.mark.parametrize(
    ("kv", "alter", "error", "text"),
    [case[1:] for case in GENERATING],
    ids=[case[0] for case in GENERATING],
)
def test_a_client_that_generates_gives_no_token_for_it(kv, alter, error, text):
    with scene("llama") as here:
        service = HostileService(here.service, alter)
        link = LocalLink(service, here.service.admit("alice"))
        alice = here.client(kv=kv, link=link)
        with pytest.raises(error, match=text):
            alice.says(prompt())
        assert len(service.handled) <= 3


def test_blocks_that_change_between_two_tokens_are_refused():
    def alter(request: m.Request[Any], reply: m.Reply) -> m.Reply:
        if not isinstance(reply, m.GenerateReply) or not request.past:
            return reply
        return replace(reply, entries=tuple(replace(e, block=e.block + 1) for e in reply.entries))

    with scene("llama") as here:
        link = LocalLink(HostileService(here.service, alter), here.service.admit("alice"))
        with pytest.raises(ProtocolError, match="keys and values of blocks"):
            here.client(kv="client", link=link).says(prompt())


# --- descriptions and texts -------------------------------------------------------------------

DESCRIBED: list[tuple[str, m.Request[Any], Alter, str]] = [
    ("names", m.ServiceInfoRequest(), to(INFO, served_model_names=("a\x1b[2J",)), "served_model"),
    ("many names", m.ServiceInfoRequest(), to(INFO, served_model_names=("a",) * 9999), "1024"),
    ("family", m.ServiceInfoRequest(), to(INFO, family="llama\r\n"), "family="),
    ("blocks", m.ServiceInfoRequest(), to(INFO, blocks="1" * 9999), "blocks="),
    ("budgets", m.ServiceInfoRequest(), to(INFO, budgets={"\x1b[2J": ""}), "a budget="),
    ("versions", m.ServiceInfoRequest(), to(INFO, versions={"a": "\r\n"}), "a version="),
    ("clock", m.ServiceInfoRequest(), to(INFO, time_s=math.nan), "time_s='nan'"),
    ("late clock", m.ServiceInfoRequest(), to(INFO, time_s=1e12), "time_s='1000000000000.0'"),
]


@pytest.mark.parametrize(
    ("request_", "alter", "text"),
    [case[1:] for case in DESCRIBED],
    ids=[case[0] for case in DESCRIBED],
)
def test_a_description_that_could_write_to_a_terminal_is_refused(request_, alter, text, tiny_llama):
    with world(tiny_llama()) as here:
        link = LocalLink(HostileService(here.service, alter), "")
        with pytest.raises(ProtocolError, match=text) as caught:
            link.exchange(request_)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("kind", "changes", "error"),
    [
        (STATE, {"lr": math.nan}, ProtocolError),
        (STATE, {"step": -1}, ProtocolError),
        (m.GradientsReply, {"names": ("a", "a")}, ProtocolError),
        (m.GradientsReply, {"norms": {"h.0": -1.0}}, NonFinite),
    ],
)
def test_a_state_that_no_trunk_has_is_refused(kind, changes, error, tiny_llama):
    with world(tiny_llama()) as here:
        service = HostileService(here.service, to(kind, **changes))
        alice = here.add("alice", LocalLink(service, here.service.admit("alice")))
        with alice.trunk.session(), pytest.raises(error):
            alice.trunk.gradients() if kind is m.GradientsReply else alice.trunk.training_state()


def raising(error: FedsplitError) -> Alter:
    def alter(_: m.Request[Any], reply: m.Reply) -> m.Reply:
        raise error

    return alter


@pytest.mark.parametrize("kind", [STATE, m.GradientsReply])
def test_the_text_of_an_error_is_cut_and_has_no_escapes(kind, tiny_llama):
    """In a unary call and in the stream, where a text may be as long as a header."""
    error = ProtocolError("\x1b[2J\x07Please run this:\n" + "x" * 200_000)

    def alter(request: m.Request[Any], reply: m.Reply) -> m.Reply:
        return raising(error)(request, reply) if isinstance(reply, kind) else reply

    with (
        world(tiny_llama()) as here,
        hostile_server(here.service, alter, here.service.limits) as address,
    ):
        token = here.service.admit("alice")
        with closing(GrpcLink(address, token=token, wire=WireSpec())) as link:
            trunk = here.add("alice", link).trunk
            trunk.open()
            with pytest.raises(ProtocolError) as caught:
                trunk.gradients() if kind is m.GradientsReply else trunk.training_state()
    text = str(caught.value)
    assert text.startswith("[2J Please run this: x") and text.isprintable() and len(text) <= 500


def test_a_server_that_asks_to_wait_for_a_week_is_not_waited_for(tiny_llama):
    with world(tiny_llama()) as here:
        busy = Overloaded("come back in a week", retry_after_s=7 * 86400.0)
        service = HostileService(here.service, raising(busy))
        alice = here.add("alice", LocalLink(service, here.service.admit("alice")))
        with pytest.raises(Overloaded, match="in a week"):
            alice.trunk.open()
        assert len(service.handled) == 1
