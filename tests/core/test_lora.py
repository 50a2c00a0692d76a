"""Adapters on parts: peft on the unsplit model is the judge."""

import re

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.functional import set_adapter
from peft.tuners.lora import LoraLayer

from fedsplit.errors import ConfigError
from fedsplit.model import join_model, split_model
from fedsplit.model.join import folded_state
from fedsplit.model.lora import add_adapters, save_adapter, trainable
from fedsplit.spec import LoraSpec
from simulations.families import batches, random_model
from simulations.tiny import tiny_config

# peft 0.21 asks transformers 5.23 for a name that it deprecates, and looks for its own rank
# patterns of fused experts among modules.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True:UserWarning"),
]
PLACES = {
    "everywhere": {},
    "not at the bottom": {"bottom": False},
    "not in the trunk": {"trunk": False},
    "not at the top": {"top": False},
    "trunk only": {"bottom": False, "top": False},
}


def _whole(model_type, **fields):
    return random_model(tiny_config(model_type, **{"num_hidden_layers": 4, **fields}))


def _adapted(whole, **fields):
    """Both parts with adapters of arbitrary values."""
    parts = split_model(whole, "1/2/1")
    generator = torch.Generator().manual_seed(2)
    for part in (parts.client, parts.trunk):
        add_adapters(part, LoraSpec(enabled=True, rank=4, **fields))
        _randomize(part, generator)
    return parts


def _randomize(part, generator):
    with torch.no_grad():
        for parameter in trainable(part).values():
            parameter.normal_(0.0, 0.3, generator=generator)


def _gradients(models):
    return {name: p.grad for model in models for name, p in trainable(model).items()}


def _name(parameter):
    return re.sub(r"^base_model\.model\.|\.(default|two)(?=\.|$)", "", parameter)


def _check_against_peft(whole, parts, directory):
    save_adapter(parts.client, parts.trunk, directory)
    judge = PeftModel.from_pretrained(whole, str(directory), is_trainable=True).eval()
    batch = batches(type(whole))["left"]
    wanted, found = judge(**batch), parts.client(**batch)
    real_BT = batch["attention_mask"].bool()
    assert torch.equal(wanted.logits[real_BT], found.logits[real_BT])
    wanted.loss.backward()
    found.loss.backward()
    of_whole = {_name(n): g for n, g in _gradients([judge]).items()}
    of_parts = {_name(n): g for n, g in _gradients([parts.client, parts.trunk]).items()}
    assert of_whole.keys() == of_parts.keys()
    assert all(torch.equal(gradient, of_parts[name]) for name, gradient in of_whole.items())
    return judge


@pytest.mark.parametrize("model_type", "gpt2 llama gemma2 bloom falcon phi3 granite olmoe".split())
def test_adapters_on_parts_are_one_adapter_of_the_whole(model_type, tmp_path):
    whole = _whole(model_type)
    parts = _adapted(whole)
    judge = _check_against_peft(whole, parts, tmp_path)
    merged = judge.merge_and_unload().state_dict()
    joined = join_model(parts.client, parts.trunk).state_dict()
    assert joined.keys() == merged.keys()
    assert all(torch.equal(tensor, joined[name]) for name, tensor in merged.items())


@pytest.mark.parametrize("on", PLACES.values(), ids=PLACES)
def test_each_part_has_a_switch(on, tmp_path):
    whole = _whole("llama")
    parts = _adapted(whole, **on)
    blocks = {int(n.split(".")[2]) for part in (parts.client, parts.trunk) for n in trainable(part)}
    places = {"bottom": {0}, "trunk": {1, 2}, "top": {3}}
    assert blocks == set().union(*(b for place, b in places.items() if on.get(place, True)))
    _check_against_peft(whole, parts, tmp_path)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "granite", "olmoe"])
def test_automatic_targets_are_those_of_peft(model_type):
    parts = _adapted(_whole(model_type))
    asked = "all-linear" if model_type in ("granite", "olmoe") else None
    config = LoraConfig(
        r=4, target_modules=asked, task_type="CAUSAL_LM", fan_in_fan_out=model_type == "gpt2"
    )
    judge = get_peft_model(_whole(model_type), config)
    wanted = {name.removeprefix("base_model.model.") for name in trainable(judge)}
    assert {n for part in (parts.client, parts.trunk) for n in trainable(part)} == wanted


def test_a_switch_covers_targets_outside_the_blocks():
    without_top = _adapted(_whole("llama"), targets="q_proj,lm_head", top=False)
    assert {name.split(".")[2] for name in trainable(without_top.client)} == {"0"}


TARGETS = {
    "all-linear": "all-linear",
    "q_proj, lm_head": ["q_proj", "lm_head"],
    "lm_head": ["lm_head"],
    "embed_tokens,v_proj": ["embed_tokens", "v_proj"],
    "layers.1.mlp.up_proj": ["layers.1.mlp.up_proj"],
    r".*layers\.(1|3)\..*(q|v)_proj": r".*layers\.(1|3)\..*(q|v)_proj",
    r"model\.layers\.\d{1,2}\.mlp\.\w+_proj": r"model\.layers\.\d{1,2}\.mlp\.\w+_proj",
}


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("targets", TARGETS)
def test_targets_are_those_of_peft_on_the_whole(targets, tied, tmp_path):
    whole = _whole("llama", tie_word_embeddings=tied)
    parts = _adapted(whole, targets=targets)
    config = LoraConfig(r=4, target_modules=TARGETS[targets], task_type="CAUSAL_LM")
    judge = get_peft_model(_whole("llama", tie_word_embeddings=tied), config)
    wanted = {name.removeprefix("base_model.model.") for name in trainable(judge)}
    assert {n for part in (parts.client, parts.trunk) for n in trainable(part)} == wanted
    _check_against_peft(whole, parts, tmp_path)


def test_a_saved_adapter_names_the_modules_that_have_one(tmp_path):
    # peft shortens lists of 20 and more to suffixes, here of the client's modules only.
    whole = _whole("llama", num_hidden_layers=6)
    parts = split_model(whole, "2/2/2")
    for part in (parts.client, parts.trunk):
        add_adapters(part, LoraSpec(enabled=True, targets="all-linear", trunk=False))
    save_adapter(parts.client, parts.trunk, tmp_path)
    judge = PeftModel.from_pretrained(whole, str(tmp_path), is_trainable=True)
    wanted = {name.removeprefix("base_model.model.") for name in trainable(judge)}
    assert trainable(parts.client).keys() == wanted


def test_fresh_adapters_change_nothing_and_follow_the_seed():
    whole = _whole("llama")
    batch = batches(type(whole))["none"]
    made = []
    for seed in (3, 3, 4):
        client = split_model(whole, "1/2/1").client
        before = torch.get_rng_state()
        add_adapters(client, LoraSpec(enabled=True), seed)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(client(**batch).logits, whole(**batch).logits)
        made.append(torch.cat([p.detach().flatten() for p in trainable(client).values()]))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_without_adapters_everything_trains():
    client = split_model(_whole("llama"), "1/2/1").client
    add_adapters(client, LoraSpec(enabled=False))
    assert trainable(client).keys() == dict(client.named_parameters()).keys()
    assert folded_state(client).keys() == client.state_dict().keys()


def test_a_part_without_adapters_is_frozen():
    parts = _adapted(_whole("llama"), trunk=False)
    assert trainable(parts.trunk) == {}
    assert trainable(parts.client)


def test_the_mode_of_a_part_is_kept():
    client = _adapted(_whole("llama"), dropout=0.5).client
    assert not any(module.training for module in client.modules())


@pytest.mark.parametrize("targets", ["qqq_proj", "c_attn,c_proj", "layers[.]9[.].*", "*q_proj("])
def test_targets_that_are_not_there_are_refused(targets):
    told = re.escape(f"lora.targets={targets} does not work for Llama")
    with pytest.raises(ConfigError, match=told):
        _adapted(_whole("llama"), targets=targets)


def test_a_target_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"does not work .*no module is called vproj"):
        _adapted(_whole("llama"), targets="q_proj,vproj")


def test_targets_in_places_that_are_switched_off_are_refused():
    with pytest.raises(ConfigError, match=r"all are in the top, but lora.top=false"):
        _adapted(_whole("llama"), targets="lm_head", top=False)


def test_dropout_on_fused_experts_is_refused():
    with pytest.raises(ConfigError, match="does not work for OlmoeForCausalLM .*lora_dropout"):
        _adapted(_whole("olmoe"), dropout=0.1)


def test_adapters_of_two_kinds_are_not_one_adapter(tmp_path):
    parts = split_model(_whole("llama"), "1/2/1")
    add_adapters(parts.client, LoraSpec(enabled=True, rank=4))
    add_adapters(parts.trunk, LoraSpec(enabled=True, rank=2))
    with pytest.raises(ConfigError, match="not of one kind: r is 4 and 2"):
        save_adapter(parts.client, parts.trunk, tmp_path)


@pytest.mark.filterwarnings("ignore:Already found a .peft_config:UserWarning")
def test_the_active_one_of_several_adapters_is_saved(tmp_path):
    whole = _whole("llama")
    parts = split_model(whole, "1/2/1")
    for part in (parts.client, parts.trunk):
        for name, target in (("one", "q_proj"), ("two", "v_proj")):
            inject_adapter_in_model(LoraConfig(r=4, target_modules=[target]), part, name)
        set_adapter(part, "two")
        _randomize(part, torch.Generator().manual_seed(3))
    _check_against_peft(whole, parts, tmp_path)
    for module in parts.client.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter(["one", "two"])
    with pytest.raises(ConfigError, match="adapters one, two, of which 2 are active"):
        save_adapter(parts.client, parts.trunk, tmp_path)


def test_parts_that_peft_has_wrapped_are_saved_and_joined(tmp_path):
    whole = _whole("llama")
    parts = split_model(whole, "1/2/1")
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = [get_peft_model(part, config).eval() for part in (parts.client, parts.trunk)]
    for part in wrapped:
        _randomize(part, torch.Generator().manual_seed(3))
    save_adapter(*wrapped, tmp_path)
    judge = PeftModel.from_pretrained(whole, str(tmp_path)).eval()
    batch = batches(type(whole))["none"]
    assert torch.equal(wrapped[0](**batch).logits, judge(**batch).logits)
    merged = judge.merge_and_unload()
    assert torch.equal(join_model(*wrapped)(**batch).logits, merged(**batch).logits)


def test_prompts_have_no_place_in_a_model():
    parts = split_model(_whole("llama"), "1/2/1")
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="type PROMPT_TUNING is a prompt"):
        join_model(get_peft_model(parts.client, config), parts.trunk)


def test_a_part_gets_one_adapter():
    client = _adapted(_whole("llama")).client
    with pytest.raises(ConfigError, match="LlamaForCausalLM has an adapter"):
        add_adapters(client, LoraSpec(enabled=True, targets="q_proj"))


def test_there_must_be_an_adapter_to_save(tmp_path):
    parts = split_model(_whole("llama"), "1/2/1")
    with pytest.raises(ConfigError, match="neither client nor trunk has adapters to save"):
        save_adapter(parts.client, parts.trunk, tmp_path)
