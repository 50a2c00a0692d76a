"""What a part saves, against transformers, which must not load it, and our loader, which must."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from fedsplit.errors import CheckpointError, ConfigError
from fedsplit.model import connect, split_model
from fedsplit.model.build import load_whole
from fedsplit.model.checkpoint import load_part
from fedsplit.model.lora import add_adapters
from fedsplit.spec import LoraSpec
from simulations.families import batches, random_model
from simulations.tiny import tiny_config

REFUSED = "one part of a split model and not a model; load it with fedsplit.model.checkpoint"


def parts_of(model_type="llama"):
    return split_model(random_model(tiny_config(model_type, num_hidden_layers=4)), "1/2/1")


def save_with_trainer(part, folder):
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")
    Trainer(model=part, args=args).save_model()


SAVES = {
    "save_pretrained": lambda part, folder: part.save_pretrained(folder),
    "tensors of the caller": lambda part, folder: part.save_pretrained(
        folder, state_dict=part.state_dict(), is_main_process=True, safe_serialization=True
    ),
    "as push_to_hub does": lambda part, folder: part.save_pretrained(folder, max_shard_size="50GB"),
    "Trainer.save_model": save_with_trainer,
}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_a_saved_part_is_loaded_by_load_part_and_refused_as_a_model(save, tmp_path):
    parts = parts_of()
    batch = batches(LlamaForCausalLM)["right"]
    wanted = parts.client(**batch).logits
    for name in ("client", "trunk"):
        save(getattr(parts, name), tmp_path / name)
        for model_class in (AutoModelForCausalLM, LlamaForCausalLM):
            with pytest.raises(ValueError, match=REFUSED):
                model_class.from_pretrained(tmp_path / name)
    client, trunk = load_part(tmp_path / "client"), load_part(tmp_path / "trunk")
    connect(client, trunk.run)
    assert torch.equal(client(**batch).logits, wanted)


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_tied_weights_and_experts_are_saved_and_loaded(model_type, tmp_path):
    parts = parts_of(model_type)
    batch = batches(parts.client.family)["right"]
    parts.client.save_pretrained(tmp_path)
    client = load_part(tmp_path)
    connect(client, parts.trunk.run)
    assert torch.equal(client(**batch).logits, parts.client(**batch).logits)


def test_a_setting_that_the_config_s_class_drops_is_loaded(tmp_path):
    whole = random_model(tiny_config("qwen2", num_hidden_layers=4))
    assert not whole.config.use_sliding_window, "else the class keeps the window"
    whole.config.sliding_window = 2
    parts = split_model(whole, "1/2/1")
    parts.client.save_pretrained(tmp_path)
    client = load_part(tmp_path)
    assert client.config.sliding_window == 2
    connect(client, parts.trunk.run)
    batch = batches(type(whole))["right"]
    assert torch.equal(client(**batch).logits, whole(**batch).logits)


def test_a_part_is_not_loaded_onto_no_device(tmp_path):
    parts_of().client.save_pretrained(tmp_path)
    with torch.device("meta"), pytest.raises(CheckpointError, match="meta device context manager"):
        load_part(tmp_path)


def test_no_loader_takes_a_saved_part_for_a_model(tmp_path):
    client = parts_of().client
    client.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=REFUSED):
        split_model(str(tmp_path))
    with pytest.raises(CheckpointError, match=REFUSED):
        load_whole(config, str(tmp_path), model_class=LlamaForCausalLM)
    # transformers cannot read the directory under another config either.
    with pytest.raises(KeyError, match="metadata"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=client.config)


def test_a_part_with_adapters_is_loaded_into_one_with_the_same_adapters(tmp_path):
    parts, again = parts_of(), parts_of()
    lora = LoraSpec(enabled=True, rank=2)
    add_adapters(parts.client, lora, seed=1)
    parts.client.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="the part was saved with its adapters"):
        load_part(tmp_path)
    add_adapters(again.client, lora, seed=2)
    again.client.load_state_dict(load_file(tmp_path / "part.safetensors"))
    wanted = parts.client.state_dict()
    assert all(torch.equal(t, wanted[k]) for k, t in again.client.state_dict().items())


OPTIONS = {"variant": "fp16", "safe_serialization": False, "max_shard_size": "5MB"}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_without_effect_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match=rf"save_pretrained\({name}=.*: a part is saved as one"):
        parts_of().trunk.save_pretrained(tmp_path, **{name: OPTIONS[name]})


def test_a_part_is_not_saved_beside_a_model(tmp_path):
    parts_of().client.family(parts_of().client.config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"holds a whole model \(model.safetensors\)"):
        parts_of().client.save_pretrained(tmp_path)
