"""Parameter versions: old graphs survive a step, and nothing is copied where none is out."""

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn

from fedsplit.model import initial_parts
from fedsplit.spec import SplitSpec, TrainSpec
from fedsplit.trunk.versions import ParameterVersions

SGD = TrainSpec(optimizer="sgd", lr=0.5, schedule="constant", warmup_steps=0)
SHAPE = (2, 5, 16)


def trunk_of(config, *, checkpointing=False):
    trunk = initial_parts(config, SplitSpec.parse("1/*/1"), seed=0).trunk.train()
    if checkpointing:
        trunk.activation_checkpointing_enable()
    return trunk


def names_of(trunk):
    return tuple(name for name, _ in trunk.named_parameters())


def hidden(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(trunk, leaves, seed):
    """What the trunk's parameters get from a sum of outputs, on the leaves installed now."""
    out_BTD = trunk.run(hidden(seed))
    return torch.autograd.grad(out_BTD.square().sum(), list(leaves.values()))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_a_backward_after_a_step_is_on_the_version_of_its_forward(tiny_llama, checkpointing):
    reference = trunk_of(tiny_llama())
    expected = gradients(reference, dict(reference.named_parameters()), seed=1)

    trunk = trunk_of(tiny_llama(), checkpointing=checkpointing)
    versions = ParameterVersions(trunk, names_of(trunk), SGD)
    out_BTD = trunk.run(hidden(1))
    versions.pin(0)
    old = versions.leaves(0)
    versions.step({name: torch.ones_like(p) for name, p in old.items()}, step=0)
    with versions.installed(0):
        found = torch.autograd.grad(out_BTD.square().sum(), list(old.values()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for name, parameter in trunk.named_parameters():
        assert torch.equal(parameter, old[name] - 0.5), "the model is at the new version again"


def test_a_recomputing_backward_on_the_wrong_version_would_be_noticed(tiny_llama):
    trunk = trunk_of(tiny_llama(), checkpointing=True)
    versions = ParameterVersions(trunk, names_of(trunk), SGD)
    out_BTD = trunk.run(hidden(1))
    versions.pin(0)
    old = versions.leaves(0)
    versions.step({name: torch.ones_like(p) for name, p in old.items()}, step=0)
    found = torch.autograd.grad(out_BTD.square().sum(), list(old.values()))
    reference = trunk_of(tiny_llama())
    expected = gradients(reference, dict(reference.named_parameters()), seed=1)
    assert not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def storages(versions):
    return {n: p.untyped_storage().data_ptr() for n, p in versions.leaves(versions.current).items()}


@pytest.mark.parametrize(("pinned", "moves"), [(False, False), (True, True)])
def test_a_step_copies_only_if_a_graph_is_out(tiny_llama, pinned, moves):
    trunk = trunk_of(tiny_llama())
    versions = ParameterVersions(trunk, names_of(trunk), SGD)
    if pinned:
        versions.pin(0)
    before = storages(versions)
    versions.step({n: torch.ones_like(p) for n, p in versions.leaves(0).items()}, step=0)
    assert (storages(versions) != before) == moves


def test_an_old_version_is_let_go_with_its_last_graph(tiny_llama):
    trunk = trunk_of(tiny_llama())
    versions = ParameterVersions(trunk, names_of(trunk), SGD)
    versions.pin(0)
    versions.pin(0)
    versions.step({}, step=0)
    versions.unpin(0)
    assert versions.leaves(0)
    versions.unpin(0)
    with pytest.raises(KeyError):
        versions.leaves(0)
    assert versions.leaves(1)


def test_steps_are_those_of_the_plain_optimizer(tiny_llama):
    train = TrainSpec(lr=0.1, warmup_steps=0, schedule="constant", clip_norm=0.0)
    trunk, plain = trunk_of(tiny_llama()), trunk_of(tiny_llama())
    versions = ParameterVersions(trunk, names_of(trunk), train)
    matrices = [p for p in plain.parameters() if p.ndim >= 2]
    vectors = [p for p in plain.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors}]
    reference = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in range(3):
        if step == 1:
            versions.pin(versions.current)
        leaves = versions.leaves(versions.current)
        found = gradients(trunk, leaves, seed=step)
        versions.step(dict(zip(leaves, found, strict=True)), step)
        plain.run(hidden(step)).square().sum().backward()
        reference.step()
        reference.zero_grad()
    for ours, theirs in zip(trunk.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_that_is_built_in_another_thread_does_not_get_at_the_leaves(tiny_llama):
    trunk = trunk_of(tiny_llama())
    versions = ParameterVersions(trunk, names_of(trunk), SGD)
    with init_empty_weights():  # it replaces parameters of all modules of this process
        versions.pin(0)
        versions.step({n: torch.ones_like(p) for n, p in versions.leaves(0).items()}, step=0)
        for version in (0, 1):
            with versions.installed(version):
                held = dict(trunk.named_parameters())
                assert all(held[k] is leaf for k, leaf in versions.leaves(version).items())


def test_only_the_trained_parameters_change(tiny_llama):
    trunk = trunk_of(tiny_llama())
    first, *others = names_of(trunk)
    kept = {name: trunk.get_parameter(name) for name in others}
    versions = ParameterVersions(trunk, (first,), SGD)
    versions.step({first: torch.ones_like(versions.leaves(0)[first])}, step=0)
    assert all(trunk.get_parameter(name) is parameter for name, parameter in kept.items())
    assert isinstance(trunk.get_parameter(first), nn.Parameter)
