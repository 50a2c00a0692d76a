"""Adapters on parts: peft on the unsplit model is the judge."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

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
]
PLACES = {
    "everywhere": {},
    "not at the bottom": {"bottom": False},
    "not in the trunk": {"trunk": False},
    "not at the top": {"top": False},
    "trunk only": {"bottom": False, "top": False},
}


def _whole(model_type):
    return random_model(tiny_config(model_type, num_hidden_layers=4))


def _adapted(whole, **fields):
    """Both parts with adapters of arbitrary values."""
    parts = split_model(whole, "1/2/1")
    generator = torch.Generator().manual_seed(2)
    for part in (parts.client, parts.trunk):
        add_adapters(part, LoraSpec(enabled=True, rank=4, **fields))
        with torch.no_grad():
            for parameter in trainable(part).values():
                parameter.normal_(0.0, 0.3, generator=generator)
    return parts


def _gradients(models):
    return {name: p.grad for model in models for name, p in trainable(model).items()}


def _check_against_peft(whole, parts, directory):
    save_adapter(parts.client, parts.trunk, directory)
    judge = PeftModel.from_pretrained(whole, str(directory), is_trainable=True).eval()
    batch = batches(type(whole))["left"]
    wanted, found = judge(**batch), parts.client(**batch)
    real_BT = batch["attention_mask"].bool()
    assert torch.equal(wanted.logits[real_BT], found.logits[real_BT])
    wanted.loss.backward()
    found.loss.backward()
    of_whole = {n.removeprefix("base_model.model."): g for n, g in _gradients([judge]).items()}
    of_parts = _gradients([parts.client, parts.trunk])
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


def test_named_targets_may_be_outside_the_blocks():
    parts = _adapted(_whole("llama"), targets="q_proj, lm_head")
    modules = {name.rsplit(".lora", 1)[0].rsplit(".", 1)[-1] for name in trainable(parts.client)}
    assert modules == {"q_proj", "lm_head"}
    without_top = _adapted(_whole("llama"), targets="q_proj,lm_head", top=False)
    assert {name.split(".")[2] for name in trainable(without_top.client)} == {"0"}


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


@pytest.mark.parametrize("targets", ["qqq_proj", "c_attn,c_proj"])
def test_targets_that_are_not_there_are_refused(targets):
    with pytest.raises(ConfigError, match=f"lora.targets={targets} does not work for Llama"):
        _adapted(_whole("llama"), targets=targets)


def test_dropout_on_fused_experts_is_refused():
    with pytest.raises(ConfigError, match="does not work for OlmoeForCausalLM .*lora_dropout"):
        _adapted(_whole("olmoe"), dropout=0.1)


def test_there_must_be_an_adapter_to_save(tmp_path):
    parts = split_model(_whole("llama"), "1/2/1")
    with pytest.raises(ConfigError, match="neither client nor trunk has adapters to save"):
        save_adapter(parts.client, parts.trunk, tmp_path)
