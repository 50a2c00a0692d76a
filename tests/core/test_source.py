"""The files of a checkpoint's folder: those that transformers reads, or a refusal in one line."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedsplit.errors import CheckpointError, UnsupportedModel
from fedsplit.model import split_model
from fedsplit.model.build import load_whole
from fedsplit.model.plan import model_class_for
from fedsplit.model.source import Source
from simulations.families import random_model

INDEX = "model.safetensors.index.json"


@pytest.fixture
def saved(tiny_llama, tmp_path):
    """A folder with a model in one file."""
    random_model(tiny_llama(vocab_size=99)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _leave_shards_of_another(folder):
    other = random_model(AutoModelForCausalLM.from_pretrained(folder).config, seed=1)
    shards = folder.parent / "shards"
    other.save_pretrained(shards, max_shard_size="20KB")
    for path in shards.glob("model*"):
        path.rename(folder / path.name)


def _leave_an_index(folder):
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "gone.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))


def _mix_up_the_index(folder):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    mixed = dict(zip(files, reversed(files.values()), strict=True))
    assert mixed != files
    _edit(folder / INDEX, weight_map=mixed)


def _name_the_file(folder):
    (folder / "model.safetensors").rename(folder / "own.safetensors")
    _edit(folder / "config.json", transformers_weights="own.safetensors")


def _mix_dtypes(folder):
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if ".layers.1." in name:
            tensors[name] = tensors[name].bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _edit(folder / "config.json", dtype=None)


READ = {
    "two dtypes, and none in the config": _mix_dtypes,
    "one file beside old shards": _leave_shards_of_another,
    "one file beside an old index": _leave_an_index,
    "shards with a wrong index": _mix_up_the_index,
    "a file that the config names": _name_the_file,
}


@pytest.mark.parametrize("change", READ.values(), ids=READ)
def test_the_weights_are_those_that_transformers_reads(change, saved):
    change(saved)
    whole = AutoModelForCausalLM.from_pretrained(saved).eval()
    parts = split_model(str(saved), "1/2/1")
    ids_BT = torch.arange(3, 11)[None]
    assert torch.equal(parts.client(ids_BT).logits, whole(ids_BT).logits)


def _store_as(dtype):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        for name in (f"model.layers.{i}.mlp.up_proj.weight" for i in range(4)):
            tensors[name] = tensors[name].to(dtype)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def _add_an_adapter(folder):
    LoraConfig(target_modules=["q_proj"]).save_pretrained(folder)


def _rename(name):
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def _cut_off_a_shard(folder):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shard = sorted(folder.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])


REFUSED = {
    "an adapter beside it": (
        _add_an_adapter,
        r"an adapter beside the model \(adapter_config.json\), .* load_adapter or --adapter",
    ),
    "float8 values": (
        _store_as(torch.float8_e4m3fn),
        r"up_proj.weight': its weights are quantized \(F8_E4M3\), and fedsplit reads plain weights",
    ),
    "8-bit values": (
        _store_as(torch.int8),
        r"up_proj.weight': its weights are quantized \(I8\), and fedsplit reads plain weights",
    ),
    "pickled weights": (
        _rename("pytorch_model.bin"),
        r"no model.safetensors, but pytorch_model.bin; fedsplit reads safetensors only",
    ),
    "a variant": (
        _rename("model.fp16.safetensors"),
        r"no model.safetensors, but model.fp16.safetensors; fedsplit reads",
    ),
    "a shard that is cut off": (
        _cut_off_a_shard,
        r"model-00002-of-\d+.safetensors: cannot be read as safetensors",
    ),
}


@pytest.mark.parametrize(("change", "text"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(change, text, saved):
    change(saved)
    with pytest.raises((CheckpointError, UnsupportedModel), match=text) as error:
        split_model(str(saved), "1/2/1")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors"])
def test_an_unsplit_model_s_quantized_weights_are_refused_before_they_are_read(method, saved):
    _edit(saved / "config.json", quantization_config={"quant_method": method, "bits": 4})
    (saved / "model.safetensors").unlink()
    config = Source(name=str(saved)).config()
    with pytest.raises(UnsupportedModel, match=rf"its weights are quantized \({method}\)"):
        load_whole(config, str(saved), model_class=model_class_for(config))
