"""Autograd through a remote trunk: backwards, modes and dtypes are those of the unsplit model."""

from dataclasses import replace

import pytest
import torch

from fedsplit.errors import ProtocolError, SessionLost, StaleVersion
from fedsplit.link import LocalLink
from fedsplit.model import connect, initial_parts, join_model
from fedsplit.spec import WireSpec
from fedsplit.wire import messages as m
from tests.core.worlds import batch, small_run, world

DROPOUT = dict(resid_pdrop=0.3, embd_pdrop=0.0, attn_pdrop=0.3)
HISTORY = WireSpec(up="int8", down="int8", history_bytes=1 << 20)
IDS_BT = batch(0).inputs["input_ids"]


class Noting(LocalLink):
    """A link that keeps the requests and replies that cross it."""

    def __init__(self, service, token):
        super().__init__(service, token)
        self.seen = []

    def exchange(self, request):
        reply = super().exchange(request)
        self.seen.append((request, reply))
        return reply

    def forwards(self):
        return [each for each, _ in self.seen if isinstance(each, m.ForwardRequest)]


def start(here, name="alice", **options):
    """A client with an open session, whose link notes what crosses."""
    member = here.add(name, Noting(here.service, here.service.admit(name)), **options)
    member.trunk.open()
    return member


def unsplit(here, member):
    return join_model(member.model, here.parts.trunk)


def gradients(member):
    """The gradients of all three parts, by name."""
    told = member.trunk.gradients(tensors=True)
    own = {k: p.grad for k, p in member.model.named_parameters() if p.grad is not None}
    return own | dict(zip(told.names, told.gradients, strict=True))


def require_close(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, msg=name, **tolerance)


def two_losses(model):
    """Two losses of one forward, of different tokens."""
    logits = model(IDS_BT).logits
    return logits[:, :5].logsumexp(-1).mean(), logits[:, 5:].square().mean()


# --- several backwards through one forward --------------------------------------------------------


def retained(model):
    first, second = two_losses(model)
    first.backward(retain_graph=True)
    second.backward()


def of_the_same_loss(model):
    loss, _ = two_losses(model)
    for _ in range(3):
        loss.backward(retain_graph=True)


def by_grad(model):
    parameters = dict(model.named_parameters())
    for loss in two_losses(model):
        found = torch.autograd.grad(
            loss, list(parameters.values()), retain_graph=True, allow_unused=True
        )
        for parameter, gradient in zip(parameters.values(), found, strict=True):
            if gradient is not None:
                before = 0 if parameter.grad is None else parameter.grad
                parameter.grad = before + gradient


@pytest.mark.parametrize("backwards", [retained, of_the_same_loss, by_grad])
def test_several_backwards_through_one_forward_are_the_unsplit_models(tiny_llama, backwards):
    with world(tiny_llama()) as here:
        alice = start(here)
        whole = unsplit(here, alice)
        for model in (alice.model, whole):
            backwards(model)
        theirs = {name: p.grad for name, p in whole.named_parameters()}
        require_close(gradients(alice), theirs)
        norm = sum(t.double().square().sum() for t in alice.trunk.gradients(tensors=True).gradients)
        assert alice.trunk.trunk_sq_norm == pytest.approx(norm.item(), rel=1e-5)
        assert here.service.engine.stashed_bytes == 0


@pytest.mark.parametrize("wire", [WireSpec(), HISTORY], ids=["plain", "history"])
def test_another_backward_has_the_dropout_of_its_forward(tiny_gpt2, wire):
    found = []
    for times in (1, 2):
        with world(tiny_gpt2(**DROPOUT), small_run(wire=wire)) as here:
            alice = start(here)
            alice.model.train()
            with alice.trunk.examples(torch.arange(2)), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                loss = alice.model(IDS_BT, labels=IDS_BT).loss
            for _ in range(times):
                loss.backward(retain_graph=True)
            found.append({name: gradient / times for name, gradient in gradients(alice).items()})
    require_close(found[1], found[0], atol=1e-7, rtol=1e-5)


def test_several_backwards_in_micro_batches(tiny_llama):
    base = small_run()
    run = replace(base, train=replace(base.train, micro_batches=2))
    with world(tiny_llama(), run) as here:
        alice = start(here)
        whole = unsplit(here, alice)

        def work():
            retained(alice.model)

        alice.trunk.run_pieces([work, work, work])
        for _ in range(3):
            retained(whole)
        theirs = {name: p.grad for name, p in whole.named_parameters()}
        require_close(gradients(alice), theirs)


def test_another_backward_needs_a_graph_that_was_retained(tiny_llama):
    with world(tiny_llama()) as here:
        alice = start(here)
        out_BTD = alice.trunk(torch.ones(2, 12, 16, requires_grad=True))
        out_BTD.sum().backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            out_BTD.sum().backward()


def test_another_backward_after_a_step_is_refused(tiny_llama):
    with world(tiny_llama()) as here:
        alice = start(here)
        loss, _ = two_losses(alice.model)
        loss.backward(retain_graph=True)
        alice.trunk.step(step=0, num_tokens=22, client_sq_norm=0.0)
        with pytest.raises(
            StaleVersion, match="call 0 came after the trunk's step.*add the losses"
        ):
            loss.backward()


@pytest.mark.parametrize("again", [False, True])
def test_a_backward_after_its_session_is_refused(tiny_llama, again):
    with world(tiny_llama()) as here:
        alice = start(here)
        loss, _ = two_losses(alice.model)
        if again:
            loss.backward(retain_graph=True)
        alice.trunk.open()
        with pytest.raises(SessionLost, match="unknown or has ended; open a new one"):
            loss.backward()
        loss, _ = two_losses(alice.model)
        alice.trunk.close()
        with pytest.raises(SessionLost, match="unknown or has ended; open a new one"):
            loss.backward()


def test_second_derivatives_are_refused_and_first_ones_are_right(tiny_llama):
    with world(tiny_llama(attn_implementation="eager")) as here:
        alice = start(here)
        whole = unsplit(here, alice)
        found = []
        for model in (alice.model, whole):
            loss, _ = two_losses(model)
            weight = model.get_input_embeddings().weight
            found += torch.autograd.grad(loss, weight, create_graph=True)
        torch.testing.assert_close(*found)
        with pytest.raises(ProtocolError, match="no second derivatives; .* without create_graph"):
            found[0].square().sum().backward()


# --- modes ----------------------------------------------------------------------------------------


def test_a_model_in_evaluation_mode_has_gradients_without_dropout(tiny_gpt2):
    with world(tiny_gpt2(**DROPOUT)) as here:
        alice = start(here)
        whole = unsplit(here, alice)
        for model in (alice.model, whole):
            model.eval()
            retained(model)
        require_close(gradients(alice), {name: p.grad for name, p in whole.named_parameters()})


def test_a_model_in_training_mode_has_dropout_without_gradients(tiny_gpt2):
    with world(tiny_gpt2(**DROPOUT)) as here:
        alice = start(here)
        hidden_BTD = torch.randn(2, 12, 16)
        alice.model.train()
        trained_BTD = alice.trunk(hidden_BTD)
        with torch.no_grad():
            others_BTD = alice.trunk(hidden_BTD)
            alice.trunk.open()
            kept = here.service.engine.stashed_bytes
            without_BTD = alice.trunk(hidden_BTD)
            alice.model.eval()
            plain_BTD = alice.trunk(hidden_BTD)
        assert kept == here.service.engine.stashed_bytes == 0
        # The dropout depends on the call, and not on whether a graph is kept.
        assert torch.equal(without_BTD, trained_BTD)
        assert not torch.equal(others_BTD, trained_BTD)
        assert torch.equal(plain_BTD, here.parts.trunk.eval().run(hidden_BTD))


@pytest.mark.parametrize(("mode", "graphs"), [("joint", True), ("frozen_trunk", False)])
def test_the_trunk_keeps_a_graph_if_it_trains_or_something_below_it(tiny_gpt2, mode, graphs):
    run = small_run()
    run = replace(run, train=replace(run.train, mode=mode))
    with world(tiny_gpt2(), run) as here:
        alice = start(here)
        alice.model.train()
        alice.model.transformer.requires_grad_(False)
        loss, _ = two_losses(alice.model)
        assert (here.service.engine.stashed_bytes > 0) == graphs
        alice.model.transformer.wte.weight.requires_grad_()
        loss, _ = two_losses(alice.model)
        assert here.service.engine.stashed_bytes > 0
        assert not any(each.other_mode for each in alice.trunk._link.forwards()[1:])


def test_an_evaluating_session_computes_where_autograd_is_on_and_refuses_the_backward(tiny_llama):
    with world(tiny_llama()) as here:
        alice = start(here)
        whole = unsplit(here, alice)
        alice.trunk.open(training=False)
        loss, _ = two_losses(alice.model)
        assert here.service.engine.stashed_bytes == 0
        torch.testing.assert_close(loss, two_losses(whole)[0])
        with pytest.raises(ProtocolError, match="session that evaluates; open one with training"):
            loss.backward()


# --- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_client_that_is_converted_later_has_a_trunk_in_its_own_dtype(tiny_llama, dtype):
    with world(tiny_llama()) as here:
        alice = start(here)
        parts = initial_parts(here.config, here.run.split, here.run.seed)
        reference, trunk = parts.client.to(dtype), parts.trunk
        alice.model.to(dtype)

        def carry(hidden_BTD, **named):
            return trunk.run(hidden_BTD.float(), **named).to(dtype)

        connect(reference, carry, trunk.new_cache)
        losses = [sum(two_losses(model)) for model in (alice.model, reference)]
        for loss in losses:
            loss.backward()
        assert losses[0].dtype == dtype and torch.equal(*losses)
        theirs = {name: p.grad for name, p in reference.named_parameters()}
        theirs |= {name: p.grad for name, p in trunk.named_parameters()}
        require_close(gradients(alice), theirs)
        ours, theirs = (
            model.eval().generate(IDS_BT[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
            for model in (alice.model, reference)
        )
        assert torch.equal(ours, theirs)
