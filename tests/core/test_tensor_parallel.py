"""A trunk that is cut over two ranks equals the trunk in one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from fedsplit.errors import UnsupportedModel
from fedsplit.model.tensor_parallel import require_shardable
from simulations.sharded import TOLERANCE
from tests.core.two_ranks import FAMILIES


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    # In a process of its own, since a fork of one with many threads may hang.
    file, folder = Path(__file__).with_name("two_ranks.py"), tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-m", "tests.core.two_ranks", str(folder)],
        cwd=file.parents[2],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def found(printed):
    return json.loads(printed[-1])


def test_families_train_and_decode_as_in_one_process(printed):
    outcomes = {line.split()[0]: line.split()[1] for line in printed if line.split()[0] in FAMILIES}
    assert outcomes == dict.fromkeys(FAMILIES, "exact") | {"llama4_text": "refused"}
    assert "tp: 4 exact, 1 refused" in printed


def test_adamw_with_clipping_takes_the_same_steps(found):
    assert found["adamw"]["difference"] <= TOLERANCE
    assert found["adamw"]["tokens"]


def test_adapters_begin_and_train_as_in_one_process(found):
    assert found["lora"]["difference"] <= TOLERANCE
    assert found["lora"]["tokens"]


def test_an_adapter_is_loaded_into_shards(found):
    assert found["adapter"] <= TOLERANCE


def test_a_state_continues_on_another_number_of_ranks(found):
    assert found["resumed"] == {"cut from alone": True, "alone from cut": True}


def test_steps_are_the_same_if_a_follower_on_ranks_computes_the_gradients(found):
    assert found["followed"] == {"leader": True, "follower": True}


def test_a_rank_reads_its_shard_of_the_files(found):
    assert found["read"]["equal"]
    assert found["read"]["share"] <= 0.55


@pytest.mark.parametrize(
    ("family", "cause"),
    [
        ("gpt2", "has no tensor parallel plan"),
        ("gpt_oss", "cuts none of its weights"),
        ("llama", "num_key_value_heads=1 is no multiple of 2"),
    ],
)
def test_a_family_that_cannot_be_cut_is_refused(found, family, cause):
    assert cause in found["refused"][family]
    assert "use launch.trunk_device=a,b" in found["refused"][family]


def test_ranks_with_dropout_need_equal_shards(found):
    """Else the adapters that all ranks have would become different ones."""
    assert "of size 33 cannot be cut into 2 equal shards, and with dropout" in found["uneven"]


def test_quantized_weights_are_not_cut(tiny_llama):
    config = tiny_llama(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(UnsupportedModel, match="are quantized; use launch.trunk_device=a,b"):
        require_shardable(LlamaForCausalLM, config, {})
