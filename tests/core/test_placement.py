"""A trunk over several devices computes what it computes on one, or is refused by name.

This machine may have no GPU: `cpu,cpu` runs the code with torch's own operations, and
two_devices.py on devices that only say they are apart, where nothing may mix them.
"""

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.errors import ConfigError
from fedsplit.link import LocalLink
from fedsplit.model import connect, initial_parts
from fedsplit.model.compiling import compile_blocks
from fedsplit.model.lora import add_adapters
from fedsplit.model.placement import _runs, devices_of, placed
from fedsplit.spec import LoraSpec, ModelSpec, SplitSpec
from fedsplit.trunk.service import TrunkService
from simulations.tiny import tiny_config
from tests.core.worlds import batch, same, small_run

ROOT = Path(__file__).parents[2]


def trunk_of(config, split="1/*/1"):
    return initial_parts(config, SplitSpec.parse(split), 0).trunk


# --- where it lies --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "devices"),
    [
        ("cpu", ["cpu"]),
        ("cuda:0,cuda:1", ["cuda:0", "cuda:1"]),
        ("cuda:1, cuda:0", ["cuda:1", "cuda:0"]),
        ("auto", [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]),
    ],
)
def test_a_setting_names_devices(device, devices):
    assert devices_of(device) == devices


@pytest.mark.parametrize(
    ("sizes", "count", "runs"),
    [
        ([4, 4, 4, 4], 2, [0, 0, 1, 1]),
        ([4, 4, 4, 4, 4], 2, [0, 0, 1, 1, 1]),
        ([4, 4, 4], 3, [0, 1, 2]),
        ([9, 1, 1, 1, 1, 1, 1, 1, 1, 1], 2, [0] + 9 * [1]),
        ([1, 1, 1, 9], 2, [0, 0, 0, 1]),
    ],
    ids=str,
)
def test_runs_are_of_about_as_many_bytes(sizes, count, runs):
    assert _runs(sizes, count) == runs


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("cpu,cuda:0", "device=cpu,cuda:0 names devices of several kinds"),
        ("cpu,cpu,cpu", "device=cpu,cpu,cpu names 3 devices, but the trunk has 2 blocks; .*split"),
        ("tpu:0,tpu:1", "device=tpu:0 cannot be used"),
    ],
)
def test_what_cannot_be_is_refused(tiny_llama, device, told):
    with pytest.raises(ConfigError, match=told):
        placed(trunk_of(tiny_llama()), device)


@pytest.mark.parametrize(("device", "hooks"), [("cpu", 0), ("auto", 0), ("cpu,cpu", 2)])
def test_one_device_has_no_hooks(tiny_llama, device, hooks):
    if device == "auto" and torch.cuda.device_count() > 1:
        pytest.skip("here auto is several devices")
    trunk = placed(trunk_of(tiny_llama()), device)
    assert sum("forward" in vars(module) for module in trunk.modules()) == hooks


# --- what it computes -----------------------------------------------------------------------------


def trained(config, run, device):
    """The trunk's state and the client's weights after three steps."""
    parts = initial_parts(config, run.split, run.seed)
    for part in (parts.client, parts.trunk):
        add_adapters(part, run.lora, run.seed)
    with TrunkService(placed(parts.trunk, device), run) as service:
        link = LocalLink(service, service.admit("alice"))
        trunk = RemoteTrunk(link, parts.client, run, client="alice")
        connect(parts.client, trunk)
        ClientTrainer(parts.client, trunk, run).fit([batch(i)] for i in range(3))
        return [service.engine.state(), dict(parts.client.named_parameters())]


RUNS = {
    "all weights": small_run(),
    "adapters": small_run(lora=LoraSpec(enabled=True, rank=2, alpha=4)),
    "bfloat16": small_run(model=ModelSpec(autocast="bfloat16")),
    "float16": small_run(model=ModelSpec(autocast="float16")),
}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
@pytest.mark.parametrize("family", ["llama", "falcon", "olmoe"])
def test_training_is_that_on_one_device(family, run):
    run = replace(run, train=replace(run.train, optimizer="adamw", checkpointing="trunk"))
    config = tiny_config(family, num_hidden_layers=4)
    assert all(map(same, trained(config, run, "cpu"), trained(config, run, "cpu,cpu")))


@pytest.mark.slow
def test_no_operation_mixes_two_devices_and_all_numbers_are_those_of_one():
    """In a process of its own: torch cannot forget a kind of device again."""
    asked = ["-q", "-p", "no:cacheprovider", "tests/core/two_devices.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *asked],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")
def test_its_blocks_are_compiled_too(tiny_llama, caplog):
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    trunk = placed(trunk_of(tiny_llama()), "cpu,cpu").train()
    smashed_BTD = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    expected_BTD = trunk.run(smashed_BTD)
    for _ in range(2):
        compile_blocks(trunk, "default")
    with fresh_cache(), config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert torch.equal(trunk.run(smashed_BTD), expected_BTD)
    (warning,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert "LlamaForCausalLM runs without torch.compile, which failed" in warning.getMessage()
