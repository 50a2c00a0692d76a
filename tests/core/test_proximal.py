"""FedProx's term against autograd on the term itself."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedsplit.client.proximal import ProximalTerm
from fedsplit.client.trainer import ClientTrainer
from fedsplit.model import join_model
from fedsplit.model.lora import trainable
from tests.core.worlds import batch, same, small_run, world

MU = 2.0


def distance(now, start):
    return MU / 2 * sum((now[name] - start[name]).square().sum() for name in start)


def test_the_gradient_is_that_of_the_term():
    chance = torch.Generator().manual_seed(0)
    weights = {name: nn.Parameter(torch.randn(3, 2, generator=chance)) for name in "ab"}
    start = {name: p.detach().clone() for name, p in weights.items()}
    term = ProximalTerm(weights.values(), MU)
    with torch.no_grad():
        for parameter in weights.values():
            parameter.add_(torch.randn(3, 2, generator=chance))
    weights["a"].grad = torch.ones(3, 2)
    term.add_gradient()
    wanted = torch.autograd.grad(distance(weights, start), list(weights.values()))
    torch.testing.assert_close(weights["a"].grad, wanted[0] + 1.0)
    torch.testing.assert_close(weights["b"].grad, wanted[1])


SHARED = [
    pytest.param(None, id="bottom and top"),
    pytest.param("layers.0.", id="the bottom's block"),
]


@pytest.mark.parametrize("shared", SHARED)
def test_training_is_that_of_the_unsplit_model_with_the_term_in_its_loss(tiny_llama, shared):
    base = small_run()
    run = replace(base, train=replace(base.train, clip_norm=0.3))
    groups = [[batch(i)] for i in range(4)]
    with world(tiny_llama(), run) as here:
        alice = here.add("alice")
        names = [n for n in trainable(alice.model) if shared is None or shared in n]
        whole = join_model(alice.model, here.parts.trunk)
        trainer = ClientTrainer(alice.model, alice.trunk, run, proximal_mu=MU, shared=names)
        trainer.fit(groups)
        found = join_model(alice.model, here.parts.trunk).state_dict()

    weights = dict(whole.named_parameters())
    start = {name: weights[name].detach().clone() for name in names}
    optimizer = torch.optim.SGD(whole.parameters(), lr=run.train.lr)
    for (each,) in groups:
        optimizer.zero_grad()
        (whole(**each.inputs, labels=each.labels).loss + distance(weights, start)).backward()
        nn.utils.clip_grad_norm_(whole.parameters(), run.train.clip_norm)
        optimizer.step()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)


def test_without_weight_there_is_no_term(tiny_llama):
    def final(**options):
        with world(tiny_llama()) as here:
            alice = here.add("alice")
            ClientTrainer(alice.model, alice.trunk, here.run, **options).fit([[batch(0)]] * 2)
        return dict(alice.model.named_parameters())

    assert same(final(), final(proximal_mu=0.0))
    assert same(final(), final(proximal_mu=MU, shared=[]))
    assert not same(final(), final(proximal_mu=MU))
