"""Several clients in one training pass: everybody's numbers are those of passes of their own."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from fedsplit.errors import ConfigError, SessionLost
from fedsplit.model import initial_parts, model_class_for
from fedsplit.model.lora import add_adapters, trainable
from fedsplit.spec import LoraSpec, PolicySpec, RunSpec, SplitSpec, TrainSpec
from fedsplit.trunk.batched_pass import BatchedPass
from fedsplit.trunk.call import Call, Kind
from fedsplit.trunk.compute import Compute, Inputs
from fedsplit.trunk.versions import ParameterVersions
from simulations.tiny import tiny_config
from tests.core.families import FAMILIES
from tests.core.requests import ask, backward_of, forward_of
from tests.core.worlds import Clock, batch, joint_run, same, small_run, wait_until, world

NAMES = ("alice", "bob", "carol")
NO_DROPOUT = {
    "gpt2": dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "opt": dict.fromkeys(("dropout", "attention_dropout"), 0.0),
}
IN_TURNS = {"olmoe"}
"""Families with a trained module that is given more than one tensor."""


@contextmanager
def counted(trunk) -> Iterator[list[int]]:
    """How many sequences each pass of the trunk was for, in order."""
    rows: list[int] = []
    hook = trunk.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    yield rows
    hook.remove()


def num_held(here):
    """How many calls the trunk holds until others can share their pass."""
    return sum(len(each.calls) for each in list(here.service.engine._scheduler._batches.values()))


def trained(config, run):
    """The trunk's weights and those of three clients after three steps, and the passes' rows."""
    with world(config, run) as here, counted(here.parts.trunk) as rows:
        members = [here.add(name) for name in NAMES]
        here.service.expect(NAMES, round=0, at_once=3, close_after=3)
        groups = [[[batch(3 * step + i)] for step in range(3)] for i in range(3)]
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda member, group: member.trainer.fit(group), members, groups))
        clients = [
            {name: p.detach().clone() for name, p in each.model.named_parameters()}
            for each in members
        ]
        return [here.trunk_weights(), *clients], rows


def largest_gap(ours, theirs):
    return max((a[k] - b[k]).abs().max() for a, b in zip(ours, theirs, strict=True) for k in a)


def inputs_of(trunk, rows, seed):
    chance = torch.Generator().manual_seed(seed)
    smashed_BTD = torch.randn(rows, 9, trunk.config.hidden_size, generator=chance)
    mask_BT = torch.ones(rows, 9, dtype=torch.int64)
    mask_BT[0, : seed + 1] = 0  # padded on the left
    return Inputs(
        smashed_BTD=smashed_BTD, attention_mask_BT=mask_BT, position_ids_BT=None, dropout=""
    )


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "adapters"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_members_gradients_are_its_own(family, adapters):
    config = tiny_config(family, num_hidden_layers=4, **NO_DROPOUT.get(family, {}))
    parts = initial_parts(config, SplitSpec.parse("1/2/1"), 0, model_class=model_class_for(config))
    trunk, run = parts.trunk, RunSpec(lora=LoraSpec(enabled=adapters, rank=2))
    if adapters:
        add_adapters(trunk, run.lora, 0)
    names = tuple(trainable(trunk))
    compute, versions = Compute(trunk, run), ParameterVersions(trunk, names, run.train)
    together = BatchedPass(trunk, compute, names)
    assert together.possible(versions) == (family not in IN_TURNS)
    if family in IN_TURNS:
        return
    members = [inputs_of(trunk, rows, seed) for seed, rows in enumerate((2, 1, 3))]
    grads = [torch.randn_like(each.smashed_BTD) for each in members]
    batched = together.forward(members, versions, 0)
    found = together.backward(batched, grads, versions, 0)
    outs = batched.trunk_out_BTD.split(batched.rows)
    for inputs, grad, out_BTD, (own, smashed_BTD) in zip(members, grads, outs, found, strict=True):
        alone_BTD = compute.forward(inputs, versions, 0).trunk_out_BTD
        wanted = [*versions.leaves(0).values(), inputs.smashed_BTD]
        *alone, back_BTD = compute.backward(alone_BTD, wanted, grad, versions, 0)
        torch.testing.assert_close(out_BTD, alone_BTD, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(smashed_BTD, back_BTD, rtol=1e-4, atol=1e-6)
        for name, gradient in zip(names, alone, strict=True):
            torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-5)


def test_three_clients_share_every_pass_and_have_the_same_numbers(tiny_llama):
    apart, rows_apart = trained(tiny_llama(), joint_run(clients=1))
    batched, rows = trained(tiny_llama(), joint_run())
    again, _ = trained(tiny_llama(), joint_run())
    assert sorted(rows_apart) == 9 * [2]
    assert rows == [3, 1, 2, *3 * [6]]  # first it is tried on made-up ones
    assert largest_gap(apart, batched) < 1e-6
    assert all(map(same, batched, again))


def test_under_autocast_too(tiny_llama):
    found = {}
    for clients in (1, 3):
        run = joint_run(clients)
        run = replace(run, model=replace(run.model, autocast="bfloat16"))
        found[clients], rows = trained(tiny_llama(), run)
    assert rows[3:] == 3 * [6]
    assert largest_gap(found[1], found[3]) < 1e-4


def test_with_dropout_everybody_computes_alone(tiny_gpt2, caplog):
    config = tiny_gpt2(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    apart, _ = trained(config, joint_run(clients=1))
    batched, rows = trained(config, joint_run())
    assert sorted(rows) == 9 * [2]
    assert "take turns: it has dropout" in caplog.text
    assert all(map(same, apart, batched))


def test_who_stays_away_costs_the_others_one_wait_and_no_number(tiny_llama):
    found = {}
    for clients in (1, 3):
        run, clock = joint_run(clients), Clock()
        with world(tiny_llama(), run, clock) as here:
            members = [here.add(name) for name in NAMES]
            for member in members:
                member.trunk.open()
            requests = [forward_of(member) for member in members]
            with ThreadPoolExecutor(3) as pool:
                list(pool.map(lambda name, request: ask(here, name, request), NAMES, requests))
                backwards = [backward_of(request) for request in requests[:2]]
                replies = pool.map(lambda n, r: ask(here, n, r), NAMES, backwards)
                if clients > 1:
                    wait_until(lambda: num_held(here) == 2)
                    clock.now += run.train.max_queue_delay_s
                    here.service.close()  # a turn of the engine
                found[clients] = [reply.grad_smashed_BTD for reply in replies]
                ask(here, "carol", backward_of(requests[2]))  # though no time passes any more
    for apart, batched in zip(found[1], found[3], strict=True):
        torch.testing.assert_close(batched, apart, rtol=1e-5, atol=1e-7)


def test_who_leaves_while_waiting_is_told(tiny_llama):
    with world(tiny_llama(), joint_run(), Clock()) as here, ThreadPoolExecutor(1) as pool:
        alice, bob = here.add("alice"), here.add("bob")
        alice.trunk.open(), bob.trunk.open()
        waiting = pool.submit(ask, here, "alice", forward_of(alice))
        wait_until(lambda: num_held(here) == 1)
        alice.trunk.close()
        with pytest.raises(SessionLost):
            waiting.result(10.0)
        ask(here, "bob", forward_of(bob))  # one client waits for no other, as no time passes


def test_a_module_that_mixes_rows_is_found_out(tiny_llama):
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x_BTD):
            return x_BTD * self.weight + x_BTD.mean(dim=0, keepdim=True)

    parts = initial_parts(tiny_llama(), SplitSpec.parse("1/*/1"), 0)
    trunk, run = parts.trunk, small_run()
    blocks = trunk.get_submodule(trunk.plan.blocks)
    blocks[1].post_attention_layernorm = Mixing()
    names = tuple(trainable(trunk))
    versions = ParameterVersions(trunk, names, run.train)
    assert not BatchedPass(trunk, Compute(trunk, run), names).possible(versions)


@pytest.mark.parametrize(
    ("train", "policy"),
    [
        ({"checkpointing": "trunk"}, {}),
        ({"compile_trunk": "default"}, {}),
        ({}, {"sim_slowdown": {"client-0": 2.0}}),
        ({}, {"kind": "async"}),
    ],
)
def test_what_does_not_go_together_is_refused(train, policy):
    with pytest.raises(ConfigError, match="clients_per_pass=2"):
        RunSpec(train=TrainSpec(clients_per_pass=2, **train), policy=PolicySpec(**policy))


@pytest.mark.parametrize("other", [{"other_mode": True}, {"autocast": "bfloat16"}], ids=str)
def test_forwards_in_different_modes_do_not_share_a_pass(tiny_llama, other):
    with world(tiny_llama(), joint_run()) as here:
        keys = []
        for name, changes in (("a", {}), ("b", other), ("c", {})):
            member = here.add(name)
            member.trunk.open()
            request = forward_of(member, **changes)
            call = Call(kind=Kind.FORWARD, client=name, session=request.session, request=request)
            engine = here.service.engine
            engine.run(partial(engine.training.prepare_forward, call)).result()
            keys.append(call.batch_key)
    assert keys[0] == keys[2] != keys[1]
