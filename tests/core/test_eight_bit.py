"""AdamW with 8-bit moments: by bitsandbytes where it is installed, else refused."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedsplit.errors import CheckpointError, ConfigError
from fedsplit.optimization import PartOptimizer
from fedsplit.runs.checkpoint import Checkpoint
from fedsplit.spec import TrainSpec
from fedsplit.spec.train import EIGHT_BIT
from tests.core.extras import needs_bitsandbytes
from tests.core.worlds import batch, small_run, world

# torch's own code, which it calls, uses what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")
TRAIN = TrainSpec(optimizer="adamw_8bit", lr=0.01, weight_decay=0.1, warmup_steps=0)


def parameters(dtype=torch.float32):
    """A matrix whose moments are 8-bit, one that is too small for it, and a bias."""
    chance = torch.Generator().manual_seed(0)
    shapes = {"large": (70, 100), "small": (8, 8), "bias": (8,)}
    return {k: nn.Parameter(torch.randn(s, generator=chance).to(dtype)) for k, s in shapes.items()}


def step(optimizer, number):
    chance = torch.Generator().manual_seed(number)
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=chance).to(parameter.dtype)
    optimizer.step(number)


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_without_bitsandbytes_it_is_refused_with_what_to_do(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    wanted = rf"train.optimizer={name} needs bitsandbytes, .* pip install 'fedsplit\[optimizers\]'"
    with pytest.raises(ConfigError, match=wanted):
        PartOptimizer(parameters(), TrainSpec(optimizer=name))


@needs_bitsandbytes
def test_a_device_it_cannot_use_is_refused():
    weight = {"w": nn.Parameter(torch.zeros(3, device="meta"))}
    with pytest.raises(ConfigError, match="cannot run on meta, which bitsandbytes .*; use train"):
        PartOptimizer(weight, TRAIN)


@needs_bitsandbytes
def test_a_step_is_that_of_bitsandbytes_with_weight_decay_for_matrices_only():
    import bitsandbytes

    ours, theirs = parameters(), parameters()
    groups = [
        {"params": [theirs["large"], theirs["small"]], "weight_decay": 0.1},
        {"params": [theirs["bias"]], "weight_decay": 0.0},
    ]
    optimizer = PartOptimizer(ours, TRAIN)
    reference = bitsandbytes.optim.AdamW8bit(groups, betas=(TRAIN.beta1, TRAIN.beta2))
    for number in range(3):
        step(optimizer, number)
        chance = torch.Generator().manual_seed(number)
        for parameter in theirs.values():
            parameter.grad = torch.randn(parameter.shape, generator=chance)
        for group in reference.param_groups:
            group["lr"] = TRAIN.lr_at(number)
        reference.step()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@needs_bitsandbytes
def test_it_is_near_adamw_and_takes_a_quarter_of_its_moments():
    ours, theirs = parameters(), parameters()
    small, full = (
        PartOptimizer(ours, TRAIN),
        PartOptimizer(theirs, replace(TRAIN, optimizer="adamw")),
    )
    for number in range(5):
        step(small, number)
        step(full, number)
    assert 0 < (ours["large"] - theirs["large"]).abs().max() < 0.02
    assert torch.allclose(ours["bias"], theirs["bias"], atol=1e-5)

    def size(optimizer):
        moments = optimizer.state().items()
        return sum(t.nbytes for name, t in moments if name.startswith("large"))

    assert size(small) < 0.32 * size(full)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_carry_over_through_a_snapshot_to_the_last_bit(tmp_path, dtype):
    run = replace(small_run(), train=TRAIN)
    straight, broken = parameters(dtype), parameters(dtype)
    first, second = PartOptimizer(straight, TRAIN), PartOptimizer(broken, TRAIN)
    for number in range(6):
        if number == 3:
            kept = Checkpoint(
                round=1,
                owner="client-0",
                settings=run.settings,
                facts={},
                tensors={"moments": second.state()},
            )
            path = kept.write(tmp_path)
            second = PartOptimizer(broken, TRAIN)
            found = Checkpoint.read(path, run, "client-0", ["moments"])
            second.load_state(found.tensors["moments"])
        step(first, number)
        step(second, number)
    assert all(torch.equal(straight[name], broken[name]) for name in straight)
    assert second.state()["large|state1"].dtype == torch.uint8
    assert second.state()["small|state1"].dtype == torch.float32


@needs_bitsandbytes
@pytest.mark.parametrize(
    "state",
    [{"large|exp_avg": torch.zeros(70, 100)}, {"large|state1": torch.zeros(3)}],
    ids=["another optimizer's", "another shape's"],
)
def test_moments_of_something_else_are_refused(state):
    with pytest.raises(CheckpointError, match="is none of an 8-bit optimizer here; resume with"):
        PartOptimizer(parameters(), TRAIN).load_state(state)


@needs_bitsandbytes
def test_paging_on_a_cpu_says_that_it_does_nothing(caplog):
    ours, theirs = parameters(), parameters()
    paged = PartOptimizer(ours, replace(TRAIN, optimizer="paged_adamw_8bit"))
    plain = PartOptimizer(theirs, TRAIN)
    step(paged, 0)
    step(plain, 0)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "paged_adamw_8bit pages nothing on a CPU; it is adamw_8bit here" in caplog.text


@needs_bitsandbytes
def test_both_sides_step_with_it_and_a_trunk_goes_on_from_its_state(tiny_llama):
    run = replace(small_run(), train=replace(TRAIN, batch_size=2, schedule="constant"))
    config = tiny_llama(hidden_size=64, intermediate_size=128)

    def trained(parts):
        """The trunk's weights after these groups of batches, a new process for each of them."""
        state, moments, ends, steps = {}, {}, {}, 0
        for numbers in parts:
            with world(config, run) as here:
                alice = here.add("alice")
                if state:
                    here.service.engine.load_state(state)
                    alice.model.load_state_dict(ends)
                    alice.trainer.optimizer.load_state(moments)
                alice.trainer.steps = steps
                alice.trainer.fit([batch(number)] for number in numbers)
                state, moments = here.service.engine.state(), alice.trainer.optimizer.state()
                ends = {k: v.clone() for k, v in alice.model.state_dict().items()}
                steps = alice.trainer.steps
        return state, moments, ends

    whole, cut = trained([[0, 1, 2, 3]]), trained([[0, 1], [2, 3]])
    assert any(tensor.dtype == torch.uint8 for tensor in whole[0].values())
    for ours, theirs in zip(cut, whole, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
