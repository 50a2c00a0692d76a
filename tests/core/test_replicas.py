"""Replicas of the trunk, further steps from stored activations, and going on from a state."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from fedsplit import errors
from fedsplit.spec import PolicySpec, TrainSpec
from tests.core.requests import ask, contribute, forward_of, prepare
from tests.core.worlds import batch, same, small_run, world

ADAM = TrainSpec(batch_size=2, lr=0.01, schedule="linear", warmup_steps=2, clip_norm=0.1)
GROUPS = {name: [[batch(10 * i + k)] for k in range(3)] for i, name in enumerate("abc")}


def fit(here, *names):
    """One round of these clients at once."""
    members = [here.members.get(name) or here.add(name) for name in names]
    here.service.expect(names, round=0, at_once=len(names), close_after=len(names))
    with ThreadPoolExecutor(len(names)) as pool:
        return list(pool.map(lambda n, m: m.trainer.fit(GROUPS[n]), names, members))


# --- replicas --------------------------------------------------------------------------------


def alone(config, run, name):
    """A client's trunk after a round in which it was the only one."""
    with world(config, run) as here:
        stats = fit(here, name)
    return stats[0], here.trunk_weights()


def test_every_client_trains_as_if_it_were_alone_and_the_mean_is_kept(tiny_gpt2):
    config, run = tiny_gpt2(resid_pdrop=0.1), small_run(train=ADAM)
    expected = {name: alone(config, run, name) for name in "ab"}
    with world(config, run, replicas=True) as here:
        before = here.trunk_weights()
        assert fit(here, "a", "b") == [stats for stats, _ in expected.values()]
        assert here.service.engine.version == 6
        assert same(here.trunk_weights(), before), "until they are averaged, the model stays"
        here.service.average({"b": 0.25, "a": 0.75})
    trunk_of = {name: trunk for name, (_, trunk) in expected.items()}
    mean = {k: trunk_of["a"][k] * 0.75 + trunk_of["b"][k] * 0.25 for k in before}
    assert same(here.trunk_weights(), mean)


def test_all_go_on_from_the_mean_also_one_that_is_new(tiny_llama):
    with world(tiny_llama(), small_run(train=ADAM), replicas=True) as here:
        fit(here, "a", "b")
        here.service.average({"a": 0.5, "b": 0.5})
        outs = []
        for name in "abc":
            member = here.members.get(name) or here.add(name)
            member.trunk.open()
            hidden = torch.ones(2, 12, 16)
            outs.append(ask(here, name, forward_of(member, smashed_BTD=hidden)).trunk_out_BTD)
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])


def test_replicas_are_told_with_the_budgets(tiny_llama):
    with world(tiny_llama(), replicas=True) as here:
        fit(here, "a", "b")
        assert here.service.budgets()["replicas"] == "2 of 4"


def test_evaluation_is_on_the_clients_own_replica(tiny_llama):
    with world(tiny_llama(), small_run(), replicas=True) as here:
        fit(here, "a")
        a, b = here.members["a"], here.add("b")
        b.model.load_state_dict(a.model.state_dict())
        assert a.trainer.evaluate([batch(7)]) != b.trainer.evaluate([batch(7)])
        here.service.average({"a": 1.0})
        assert a.trainer.evaluate([batch(7)]) == b.trainer.evaluate([batch(7)])


def test_an_average_in_the_middle_of_a_step_disturbs_no_graph(tiny_llama):
    with world(tiny_llama(), small_run(), replicas=True) as here:
        (request, _), _ = prepare(here, "a"), prepare(here, "b")
        here.service.average({"a": 0.5, "b": 0.5})
        contribute(here, "a", request)
        assert here.service.engine.version == 1


@pytest.mark.parametrize(
    ("replicas", "weights", "text"),
    [(False, {"a": 1.0}, "no replicas to average"), (True, {"a": 0.7}, "sum to 0.7, not to 1")],
)
def test_an_average_that_cannot_be_is_refused(tiny_llama, replicas, weights, text):
    with world(tiny_llama(), replicas=replicas) as here:
        with pytest.raises(errors.ConfigError, match=text):
            here.service.average(weights)


def test_a_departed_clients_replica_is_dropped_and_the_version_stays(tiny_gpt2):
    with world(tiny_gpt2(), small_run(train=ADAM), replicas=True) as here:
        fit(here, "a", "b")
        here.service.average({"a": 0.5, "b": 0.5})
        kept, version, steps = here.trunk_weights(), 6, here.service.engine.steps
        assert here.service.forget("b")
        state = here.service.engine.state()
        owners = {name.split("/")[1] for name in state if name.startswith("replica/")}
        assert owners == {"a"}
        assert (here.service.engine.version, here.service.engine.steps) == (version, steps)
        here.service.average({"a": 0.5, "b": 0.5})  # b counts as the mean
        assert same(here.trunk_weights(), kept)


# --- further steps from stored activations ----------------------------------------------------


def test_further_steps_are_those_of_the_linearized_loss(tiny_gpt2):
    """What the trunk does, done by hand on a trunk of one's own."""
    clip = 0.3
    train = replace(small_run().train, trunk_steps=3, clip_norm=clip, clip="parts")
    run = small_run(train=train)
    with world(tiny_gpt2(), run) as here:
        by_hand = [torch.nn.Parameter(p.clone()) for p in here.trunk_weights().values()]
        requests = {name: prepare(here, name, seed=i)[0] for i, name in enumerate("ab")}
        weights = {"a": 0.25, "b": 0.75}
        trunk = world_trunk(tiny_gpt2(), run)
        trunk.train()
        optimizer = torch.optim.SGD(trunk.parameters(), lr=0.1)
        for _ in range(3):
            total = [torch.zeros_like(p) for p in by_hand]
            for name, request in requests.items():
                out_BTD = trunk.run(request.smashed_BTD)
                found = torch.autograd.grad(out_BTD.sum(), list(trunk.parameters()))
                norm = torch.stack([g.norm() for g in found]).norm()
                factor = weights[name] * min(1.0, clip / float(norm))
                total = [t + factor * g for t, g in zip(total, found, strict=True)]
            for parameter, gradient in zip(trunk.parameters(), total, strict=True):
                parameter.grad = gradient
            optimizer.step()
        contribute(here, "a", requests["a"], num_tokens=5)
        contribute(here, "b", requests["b"], num_tokens=15)
        assert here.service.engine.version == 3
        assert here.service.engine.steps == 1, "at one place of the schedule"
    for name, parameter in trunk.named_parameters():
        assert torch.allclose(here.trunk_weights()[name], parameter, atol=1e-5)


def world_trunk(config, run):
    """A trunk as a world's, that nobody serves."""
    with world(config, run) as here:
        return here.parts.trunk


def test_further_steps_use_the_masks_and_the_dropout_of_the_first(tiny_gpt2):
    """With a rate of zero the further steps change nothing, so all of them see one gradient."""
    train = replace(small_run().train, trunk_steps=2, accumulation=2, lr=1e-30)
    with world(tiny_gpt2(resid_pdrop=0.5), small_run(train=train)) as here:
        taken = []
        step = here.service.engine.training.shared.versions.step

        def note(gradients, *args):
            taken.append({name: value.clone() for name, value in gradients.items()})
            step(gradients, *args)

        here.service.engine.training.shared.versions.step = note
        here.add("a").trainer.fit([[batch(0, pad=4), batch(1)]])
    assert same(*taken)


def test_nothing_is_kept_for_further_steps_that_are_not_taken(tiny_llama):
    with world(tiny_llama()) as here:
        prepare(here, "a")
        (work,) = here.service.engine.training.works._works.values()
        assert work.passes == []


def test_a_client_that_does_not_step_has_no_more_kept_for_it_than_a_step(tiny_llama):
    train = replace(small_run().train, trunk_steps=2, accumulation=2)
    with world(tiny_llama(), small_run(train=train)) as here:
        requests = [prepare(here, "a", call)[0] for call in range(2)]
        told = "this one of a has 48 positions already; a step of this run has at most 48"
        for call in range(2, 5):
            with pytest.raises(errors.TooLarge, match=told):
                prepare(here, "a", call)
        (work,) = here.service.engine.training.works._works.values()
        assert len(work.passes) == 2
        contribute(here, "a", requests[-1])
        prepare(here, "a", 5)


# --- going on from a state --------------------------------------------------------------------


def train(config, run, *, stop, replicas):
    """Two rounds of two clients; if to `stop`, everything is made anew between them."""
    names, states, ends = "ab", {}, {}
    for rounds in [[0], [1]] if stop else [[0, 1]]:
        with world(config, run, replicas=replicas) as here:
            for name in names:
                member = here.add(name)
                if name in ends:
                    weights, moments, member.trainer.steps = ends[name]
                    member.model.load_state_dict(weights)
                    member.trainer.optimizer.load_state(moments)
            if states:
                here.service.engine.load_state(states)
            for number in rounds:
                one_round(here, number, replicas)
            states = here.service.engine.state()
            for name, member in here.members.items():
                kept = member.trainer
                ends[name] = member.model.state_dict(), kept.optimizer.state(), kept.steps
    return states, {name: weights for name, (weights, *_) in ends.items()}, here


def one_round(here, number, replicas):
    names = list(here.members)
    here.service.expect(names, round=number, at_once=2, close_after=2)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda n: here.members[n].trainer.fit(GROUPS[n], round=number), names))
    if replicas and number == 0:
        here.service.average({"a": 0.5, "b": 0.5})


GOING_ON = [
    pytest.param(PolicySpec(), False, id="sync"),
    pytest.param(PolicySpec(), True, id="replicas"),
    pytest.param(PolicySpec(kind="async", sim_slowdown={"client-1": 3.0}), False, id="virtual"),
]


@pytest.mark.parametrize(("policy", "replicas"), GOING_ON)
def test_to_stop_and_go_on_changes_no_number(tiny_gpt2, policy, replicas):
    config, run = tiny_gpt2(resid_pdrop=0.1), small_run(train=ADAM, policy=policy)
    straight, halves, here = train(config, run, stop=False, replicas=replicas)
    again, halves_again, stopped = train(config, run, stop=True, replicas=replicas)
    assert same(straight, again)
    assert all(same(halves[name], halves_again[name]) for name in "ab")
    assert same(here.trunk_weights(), stopped.trunk_weights())
    assert here.service.engine.version == stopped.service.engine.version > 0
    assert here.service.now() == stopped.service.now() or not policy.sim_slowdown


def test_a_state_of_another_trunk_is_refused(tiny_llama):
    with world(tiny_llama()) as here:
        prepare(here, "a")
        state = here.service.engine.state()
        with pytest.raises(errors.CheckpointError, match="while clients are at work"):
            here.service.engine.load_state(state)
    with world(tiny_llama(), replicas=True) as apart:
        fit(apart, "a")
        replicas = apart.service.engine.state()
    with world(tiny_llama()) as here:
        with pytest.raises(errors.CheckpointError, match="a replica of the trunk for a, but"):
            here.service.engine.load_state(replicas)
        del state["trunk/parameter/model.layers.1.mlp.up_proj.weight"]
        with pytest.raises(errors.CheckpointError, match="up_proj.weight is in one of them only"):
            here.service.engine.load_state(state)
