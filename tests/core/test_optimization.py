"""The optimizer of one part against torch's own."""

import pytest
import torch
from torch import nn
from transformers import Trainer

from fedsplit.errors import CheckpointError
from fedsplit.model import model_class_for, split_model
from fedsplit.model.lora import trainable
from fedsplit.optimization import PartOptimizer, clip_coefficient, squared_norm
from fedsplit.spec import TrainSpec
from simulations.tiny import tiny_config


def parameters() -> dict[str, nn.Parameter]:
    chance = torch.Generator().manual_seed(0)
    shapes = {"weight": (3, 4), "bias": (4,)}
    return {k: nn.Parameter(torch.randn(s, generator=chance)) for k, s in shapes.items()}


def set_gradients(of: dict[str, nn.Parameter], scale: float = 1.0) -> None:
    chance = torch.Generator().manual_seed(1)
    for parameter in of.values():
        gradient = scale * torch.randn(parameter.shape, generator=chance)
        parameter.grad = gradient.to(parameter.dtype)


def test_clipping_is_torchs_own():
    ours, theirs = parameters(), parameters()
    set_gradients(ours, 5.0)
    set_gradients(theirs, 5.0)
    torch.nn.utils.clip_grad_norm_(theirs.values(), 0.7)
    coefficient = clip_coefficient(squared_norm(p.grad for p in ours.values()), 0.7)
    for name in ours:
        torch.testing.assert_close(ours[name].grad * coefficient, theirs[name].grad)


OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), fused=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.1, betas=(0.9, 0.95), fused=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_torchs_own_with_weight_decay_for_matrices_only(name):
    train = TrainSpec(
        optimizer=name, lr=0.1, momentum=0.9, weight_decay=0.5, schedule="constant", warmup_steps=0
    )
    ours, theirs = parameters(), parameters()
    groups = [
        {"params": [theirs["weight"]], "weight_decay": 0.5},
        {"params": [theirs["bias"]], "weight_decay": 0.0},
    ]
    optimizer, reference = PartOptimizer(ours, train), OPTIMIZERS[name](groups)
    for step in range(3):
        set_gradients(ours)
        set_gradients(theirs)
        optimizer.step(step)
        reference.step()
    for key in ours:
        assert torch.equal(ours[key], theirs[key])
        assert ours[key].grad is None


def test_moments_carry_over_to_a_new_process():
    train = TrainSpec(lr=0.1)
    straight, broken = parameters(), parameters()
    first, second = PartOptimizer(straight, train), PartOptimizer(broken, train)
    for step in range(4):
        if step == 2:
            moments = second.state()
            second = PartOptimizer(broken, train)
            second.load_state(moments)
        for optimizer in (first, second):
            set_gradients(optimizer.parameters, scale=step + 1.0)
            optimizer.step(step)
    assert all(torch.equal(straight[k], broken[k]) for k in straight)


def test_moments_come_back_in_the_dtype_of_their_parameter():
    train = TrainSpec(lr=0.1)

    def narrow():
        return {k: nn.Parameter(p.detach().bfloat16()) for k, p in parameters().items()}

    straight, broken = narrow(), narrow()
    first, second = PartOptimizer(straight, train), PartOptimizer(broken, train)
    for step in range(3):
        for optimizer in (first, second):
            set_gradients(optimizer.parameters)
            optimizer.step(step)
        moments = {name: moment.float() for name, moment in second.state().items()}  # on its way
        second = PartOptimizer(broken, train)
        second.load_state(moments)
    assert all(torch.equal(straight[k], broken[k]) for k in straight)


def test_a_moment_of_an_unknown_parameter_is_refused():
    with pytest.raises(CheckpointError, match="'head|exp_avg' belongs to no trained parameter"):
        PartOptimizer(parameters(), TrainSpec()).load_state({"head|exp_avg": torch.zeros(1)})


def test_the_learning_rate_can_be_scaled_for_one_step():
    train = TrainSpec(optimizer="sgd", lr=0.1, schedule="constant", warmup_steps=0)
    ours, theirs = parameters(), parameters()
    optimizer, reference = PartOptimizer(ours, train), torch.optim.SGD(theirs.values(), lr=0.1)
    for step, scale in enumerate((0.25, 1.0)):
        set_gradients(ours)
        set_gradients(theirs)
        reference.param_groups[0]["lr"] = 0.1 * scale
        optimizer.step(step, lr_scale=scale)
        reference.step()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bert"])
def test_the_parameters_that_decay_are_those_of_the_hf_trainer(model_type):
    config = tiny_config(model_type, num_hidden_layers=3)
    whole = model_class_for(config)._from_config(config)
    wanted = set(Trainer.get_decay_parameter_names(None, whole))
    parts = split_model(whole, "1/1/1")
    found = set()
    for part in (parts.client, parts.trunk):
        train = TrainSpec(optimizer="sgd", lr=1.0, weight_decay=0.5, warmup_steps=0)
        optimizer = PartOptimizer(trainable(part), train)
        for parameter in optimizer.parameters.values():
            parameter.data = torch.ones_like(parameter)
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step(0)
        found |= {k for k, p in optimizer.parameters.items() if (p == 0.5).all()}
    trained = {name for name, _ in whole.named_parameters()}
    assert found == wanted & trained
    assert any("emb" in name or "wte" in name for name in found), "embeddings decay, as there"


def test_a_part_that_trains_nothing_steps():
    PartOptimizer({}, TrainSpec()).step(0)


@pytest.mark.parametrize(
    ("schedule", "step", "share"),
    [
        pytest.param("constant", 0, 0.5, id="first of two warm-up steps"),
        pytest.param("constant", 1, 1.0, id="end of warm-up"),
        pytest.param("constant", 9, 1.0, id="constant at the end"),
        pytest.param("linear", 6, 0.5, id="linear half way"),
        pytest.param("linear", 10, 0.0, id="linear at the end"),
        pytest.param("cosine", 6, 0.5, id="cosine half way"),
        pytest.param("cosine", 50, 0.0, id="cosine past the end"),
    ],
)
def test_schedules(schedule, step, share):
    train = TrainSpec(rounds=2, local_steps=5, lr=0.2, schedule=schedule, warmup_steps=2)
    assert train.lr_at(step) == pytest.approx(0.2 * share)
