"""Adapters that were saved, by us or by peft, back on the parts of a model."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import KasaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedsplit.errors import CheckpointError, ConfigError
from fedsplit.model import SplitModel, split_model
from fedsplit.model.lora import load_adapter, save_adapter, share_frozen, trainable

# peft asks transformers for a name that it deprecates, and warns of what is tested here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter .* have invalid shape"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning"),
]
IDS_BT = torch.arange(1, 13).reshape(2, 6)


def whole_of(config) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def peft_adapter(whole: PreTrainedModel, folder: Path, **options: object) -> Path:
    """An adapter that peft made, with values that change what comes out."""
    tuned = get_peft_model(whole, LoraConfig(task_type="CAUSAL_LM", r=4, **options))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    tuned.save_pretrained(str(folder))
    tuned.unload()
    return folder


def adapted(whole: PreTrainedModel, folder: Path) -> SplitModel:
    parts = split_model(whole, "1/2/1")
    for part in (parts.client, parts.trunk):
        load_adapter(part, str(folder))
    return parts


QV = ["q_proj", "v_proj"]
KINDS = {
    "plain": {"target_modules": QV},
    "all-linear": {"target_modules": "all-linear"},
    "a regular expression": {"target_modules": r".*layers\.[12]\..*v_proj"},
    "some layers": {"target_modules": QV, "layers_to_transform": [1, 3]},
    "excluded modules": {"target_modules": QV, "exclude_modules": ["layers.1.self_attn.q_proj"]},
    "patterns of rank and alpha": {
        "target_modules": QV,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    },
    "the trunk only": {"target_modules": ["layers.2.mlp.up_proj"]},
    "DoRA": {"target_modules": QV, "use_dora": True},
    "rsLoRA": {"target_modules": QV, "use_rslora": True},
    "PiSSA": {"target_modules": QV, "init_lora_weights": "pissa"},
    "KaSA": {"target_modules": QV, "kasa_config": KasaConfig()},
    "lora_bias": {"target_modules": QV, "lora_bias": True},
    "all biases": {"target_modules": ["layers.0.self_attn.q_proj"], "bias": "all"},
    "biases of the targets": {"target_modules": QV, "bias": "lora_only"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head"]},
    "a trained head": {"target_modules": ["layers.1.mlp.up_proj"], "modules_to_save": ["lm_head"]},
    "trained modules of both parts": {"target_modules": QV, "modules_to_save": ["norm"]},
    "tokens": {"target_modules": ["layers.1.mlp.up_proj"], "trainable_token_indices": [1, 5]},
}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_an_adapter_of_peft_is_the_same_on_the_parts(options, tied, tiny_llama, tmp_path):
    whole = whole_of(tiny_llama(attention_bias=True, tie_word_embeddings=tied))
    plain = whole(IDS_BT).logits
    folder = peft_adapter(copy.deepcopy(whole), tmp_path / "a", **options)
    parts = adapted(whole, folder)
    logits = parts.client(IDS_BT).logits
    judge = PeftModel.from_pretrained(copy.deepcopy(whole), str(folder), is_trainable=True)
    assert torch.equal(logits, judge.eval()(IDS_BT).logits)
    assert not torch.allclose(logits, plain)
    trained = {n.removeprefix("base_model.model.") for n in trainable(judge)}
    assert trainable(parts.client).keys() | trainable(parts.trunk).keys() == trained
    save_adapter(parts.client, parts.trunk, tmp_path / "b")
    again = PeftModel.from_pretrained(whole, str(tmp_path / "b")).eval()
    assert torch.equal(logits, again(IDS_BT).logits)


def test_an_adapter_of_a_family_with_transposed_layers(tiny_gpt2, tmp_path):
    whole = whole_of(tiny_gpt2())
    parts = adapted(
        whole, peft_adapter(whole, tmp_path, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    expected = PeftModel.from_pretrained(whole, str(tmp_path)).eval()(IDS_BT).logits
    assert torch.equal(parts.client(IDS_BT).logits, expected)


def test_adapters_on_one_model_share_its_weights_and_train_apart(tiny_llama, tmp_path):
    whole = whole_of(tiny_llama())
    targets = {"a": ["q_proj", "v_proj"], "b": ["q_proj", "down_proj"]}  # not the same layers
    folders = [peft_adapter(whole, tmp_path / k, target_modules=t) for k, t in targets.items()]
    trunks = [adapted(whole, folder).trunk for folder in folders]
    x_BTD = torch.randn(2, 6, whole.config.hidden_size)
    before = [trunk.run(x_BTD) for trunk in trunks]
    apart = {p.data_ptr() for trunk in trunks for p in trunk.parameters()}
    share_frozen(trunks[1], trunks[0])
    shared = {p.data_ptr() for trunk in trunks for p in trunk.parameters()}
    assert all(
        torch.equal(trunk.run(x_BTD), out) for trunk, out in zip(trunks, before, strict=True)
    )
    own = sum(len(trainable(trunk)) for trunk in trunks)
    assert len(apart) - own == 2 * (len(shared) - own)
    trunks[1].run(x_BTD).sum().backward()
    torch.optim.SGD(trainable(trunks[1]).values(), lr=1.0).step()
    assert not torch.equal(trunks[1].run(x_BTD), before[1])
    assert torch.equal(trunks[0].run(x_BTD), before[0])


def test_what_trains_or_differs_is_not_shared(tiny_llama, tmp_path):
    whole = whole_of(tiny_llama())
    full, other = (split_model(copy.deepcopy(whole), "1/2/1").trunk for _ in range(2))
    folder = peft_adapter(whole, tmp_path, target_modules=["q_proj"])
    load_adapter(other, str(folder))
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if n.endswith("up_proj.weight")).add_(1.0)
    third = adapted(whole, folder).trunk
    share_frozen(other, full)
    share_frozen(third, other)
    of = [{n: p.data_ptr() for n, p in part.named_parameters()} for part in (full, other, third)]
    assert not {*of[0].values()} & {*of[1].values()}
    differ = {name for name in of[2] if of[2][name] != of[1][name]}
    assert {name for name in differ if "lora_" not in name} == {
        next(n for n in of[1] if n.endswith("up_proj.weight"))
    }


def test_saved_again_it_is_the_same(tiny_llama, tmp_path):
    whole = whole_of(tiny_llama())
    parts = adapted(whole, peft_adapter(whole, tmp_path / "a", target_modules=["q_proj"]))
    save_adapter(parts.client, parts.trunk, tmp_path / "b")
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def _without_a_tensor(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if ".2." not in k}, file)


def _with_a_strange_tensor(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    strange = {"base_model.model.model.layers.1.strange.weight": torch.zeros(1)}
    save_file(load_file(file) | strange, file)


def _of_another_rank(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 2}))


def _of_another_kind(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3", "feedforward_modules": []}')


def _for_other_layers(folder: Path) -> None:
    file = folder / "adapter_config.json"
    told = json.loads(file.read_text()) | {"target_modules": ["c_attn"]}
    file.write_text(json.dumps(told))


DAMAGED = {
    "a tensor less": (_without_a_tensor, r"tensor 'model.layers.2.*' is missing"),
    "a tensor more": (_with_a_strange_tensor, r"strange.weight' does not exist in this model"),
    "another rank": (_of_another_rank, r"has shape \(4, 16\), but this model takes \(2, 16\)"),
    "another kind": (_of_another_kind, "an adapter of type IA3; parts take LORA only"),
    "other layers": (_for_other_layers, r"not an adapter of LlamaForCausalLM \(Target modules"),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        r"there is no adapter_model.safetensors",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_does_not_fit_is_refused(case, tiny_llama, tmp_path):
    damage, told = DAMAGED[case]
    whole = whole_of(tiny_llama())
    damage(peft_adapter(whole, tmp_path, target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match=told):
        load_adapter(split_model(whole, "1/2/1").trunk, str(tmp_path))


def test_a_frozen_head_in_an_adapter_must_be_that_of_the_model(tiny_llama, tmp_path):
    whole = whole_of(tiny_llama())
    peft_adapter(whole, tmp_path, target_modules=["lm_head"])
    with torch.no_grad():
        whole.lm_head.weight.add_(1.0)
    with pytest.raises(CheckpointError, match="lm_head.base_layer.weight' differs from this model"):
        load_adapter(split_model(whole, "1/2/1").client, str(tmp_path))


REFUSED = {
    "alora_invocation_tokens": ([3, 4], "aLoRA looks for tokens of the prompt"),
    "layer_replication": ([[0, 2], [1, 4]], "it adds blocks"),
    "monteclora_config": ({}, "MonteCLoRA adds a term to the loss"),
    "velora_config": ({}, "VeLoRA compresses gradients"),
    "use_qalora": (True, "QALoRA needs quantized weights"),
    "ensure_weight_tying": (True, "parts have not been compared with it"),
    "init_lora_weights": ("corda", "CorDA changes the frozen weights"),
}


@pytest.mark.filterwarnings("ignore:.init_lora_weights. is .corda.")
@pytest.mark.parametrize("field", REFUSED)
def test_kinds_that_parts_do_not_compute_are_refused_by_name(field, tiny_llama, tmp_path):
    value, told = REFUSED[field]
    whole = whole_of(tiny_llama())
    file = peft_adapter(whole, tmp_path, target_modules=["q_proj"]) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=told):
        load_adapter(split_model(whole, "1/2/1").client, str(tmp_path))


def test_a_trained_module_of_both_parts_is_refused(tiny_llama, tmp_path):
    whole = whole_of(tiny_llama())
    peft_adapter(whole, tmp_path, target_modules=["lm_head"], modules_to_save=["model"])
    with pytest.raises(CheckpointError, match="modules_to_save has model, which is in both parts"):
        load_adapter(split_model(whole, "1/2/1").client, str(tmp_path))


def test_fields_of_a_newer_peft_are_left_out_with_a_warning(tiny_llama, tmp_path):
    whole = whole_of(tiny_llama())
    file = peft_adapter(whole, tmp_path, target_modules=["q_proj"]) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"from_the_future": 1}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['from_the_future'\]"):
        load_adapter(split_model(whole, "1/2/1").client, str(tmp_path))


def test_peft_and_transformers_do_not_load_one_share_of_an_adapter(tiny_llama, tmp_path):
    whole = whole_of(tiny_llama())
    peft_adapter(whole, tmp_path, target_modules=["q_proj"])
    told = r"call fedsplit.model.lora.load_adapter\(part, source\) for the client"
    for part in (split_model(whole, "1/2/1").client, split_model(whole, "1/2/1").trunk):
        with pytest.raises(ConfigError, match=rf"tensor 'model.layers.*in the other part; {told}"):
            PeftModel.from_pretrained(part, str(tmp_path))
    with pytest.raises(ConfigError, match=f"into one part only; {told}"):
        split_model(whole, "1/2/1").client.load_adapter(str(tmp_path))


def test_peft_loads_an_adapter_that_is_in_one_part(tiny_llama, tmp_path):
    whole = whole_of(tiny_llama())
    parts = split_model(whole, "1/2/1")
    peft_adapter(whole, tmp_path, target_modules=["layers.0.self_attn.q_proj", "lm_head"])
    found = PeftModel.from_pretrained(parts.client, str(tmp_path)).eval()(input_ids=IDS_BT).logits
    wanted = PeftModel.from_pretrained(whole, str(tmp_path)).eval()(input_ids=IDS_BT).logits
    assert torch.equal(found, wanted)
