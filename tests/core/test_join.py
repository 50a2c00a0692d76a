"""The unsplit model of two parts: peft's adapters are merged, and files are those of the family."""

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.functional import set_adapter
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from fedsplit.errors import ConfigError
from fedsplit.model import join_model, split_model
from fedsplit.model.join import folded_model
from fedsplit.model.stage import TrunkPart
from simulations.families import random_model
from simulations.tiny import tiny_config

# peft asks transformers for a name that it deprecates, and warns of what is tested here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a .peft_config:UserWarning"),
    pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True:UserWarning"),
]
IDS_BT = torch.arange(1, 13).reshape(2, 6)
BIASES = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}


def llama(**fields: object) -> PreTrainedModel:
    return random_model(tiny_config("llama", num_hidden_layers=4, **fields))


OUTSIDE = {"embed_tokens", "lm_head"}


def injected(model: PreTrainedModel, config: PeftConfig, adapter: str = "default") -> None:
    """Add an adapter of peft, whose values depend on the names of its tensors only."""
    config = copy.deepcopy(config)
    if isinstance(model, TrunkPart):
        config.target_modules -= OUTSIDE
        config.modules_to_save = config.trainable_token_indices = None
        if not config.target_modules:
            return
    before = {id(parameter) for parameter in model.parameters()}
    inject_adapter_in_model(config, model, adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) not in before:
                generator = torch.Generator().manual_seed(sum(name.encode()))
                parameter.normal_(1.0 if "ia3" in name else 0.0, 0.3, generator=generator)
    model.eval()


def layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def lora(**fields: object) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields}
    )


def with_merged(model: PreTrainedModel) -> None:
    injected(model, lora())
    for layer in layers(model):
        layer.merge()


def with_another_active(model: PreTrainedModel) -> None:
    injected(model, lora())
    injected(model, lora(target_modules=["k_proj", "v_proj"]), "other")
    set_adapter(model, "other")


def with_another_merged(model: PreTrainedModel) -> None:
    with_another_active(model)
    for layer in layers(model):
        layer.merge(adapter_names=["default"])


def with_two_active(model: PreTrainedModel) -> None:
    injected(model, lora())
    injected(model, lora(target_modules=["k_proj", "v_proj"]), "other")
    for layer in layers(model):
        layer.set_adapter(["default", "other"])


def with_disabled(model: PreTrainedModel) -> None:
    injected(model, lora(modules_to_save=["lm_head"]))
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            module.enable_adapters(False)


def with_merged_and_disabled(model: PreTrainedModel) -> None:
    with_merged(model)
    for layer in layers(model):
        layer.enable_adapters(False)


def adapter(**fields: object) -> Callable[[PreTrainedModel], None]:
    return lambda model: injected(model, lora(**fields))


ADAPTERS: dict[str, tuple[Callable[[PreTrainedModel], None], dict[str, object]]] = {
    "DoRA": (adapter(use_dora=True), {}),
    "lora_bias": (adapter(lora_bias=True), BIASES),
    "KaSA": (adapter(kasa_config=peft.KasaConfig()), {}),
    "merged": (with_merged, {}),
    "another name": (lambda model: injected(model, lora(), "mine"), {}),
    "another active": (with_another_active, {}),
    "another merged": (with_another_merged, {}),
    "two active": (with_two_active, {}),
    "disabled": (with_disabled, {}),
    "merged and disabled": (with_merged_and_disabled, {}),
    "embedding": (adapter(target_modules=["embed_tokens", "q_proj"]), {}),
    "embedding, tied": (adapter(target_modules=["embed_tokens", "q_proj"]), TIED),
    "head, tied": (adapter(target_modules=["lm_head"]), TIED),
    "modules_to_save": (adapter(modules_to_save=["lm_head"]), {}),
    "tokens, tied": (adapter(trainable_token_indices={"embed_tokens": [1, 5]}), TIED),
    "IA3": (
        lambda model: injected(
            model,
            peft.IA3Config(
                target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
            ),
        ),
        {},
    ),
    "LoHa": (lambda m: injected(m, peft.LoHaConfig(r=2, target_modules=["q_proj"])), {}),
    "OFT": (
        lambda model: injected(
            model, peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "up_proj"])
        ),
        {},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("add", "fields"), ADAPTERS.values(), ids=ADAPTERS)
def test_the_joined_model_computes_what_the_unsplit_model_with_adapters_does(add, fields, tmp_path):
    whole = llama(**fields)
    parts = split_model(whole, "1/2/1")
    for model in (whole, parts.client, parts.trunk):
        add(model)
    wanted = whole(IDS_BT).logits
    assert torch.allclose(parts.client(IDS_BT).logits, wanted, atol=1e-6)
    joined = join_model(parts.client, parts.trunk)
    assert torch.allclose(joined(IDS_BT).logits, wanted, atol=1e-5)
    assert torch.allclose(folded_model(whole)(IDS_BT).logits, wanted, atol=1e-5)
    # The parts are as before.
    assert torch.allclose(parts.client(IDS_BT).logits, wanted, atol=1e-6)
    joined.save_pretrained(tmp_path)
    again = split_model(str(tmp_path), "1/2/1").client
    assert torch.equal(again(IDS_BT).logits, joined(IDS_BT).logits)


def test_only_weights_that_differ_are_untied():
    for targets, is_tied in ((["q_proj"], True), (["embed_tokens"], False)):
        parts = split_model(llama(**TIED), "1/2/1")
        injected(parts.client, lora(target_modules=targets))
        joined = join_model(parts.client, parts.trunk)
        assert joined.config.tie_word_embeddings is is_tied
        assert (joined.lm_head.weight is joined.model.embed_tokens.weight) is is_tied
        assert parts.client.config.tie_word_embeddings


UNMERGEABLE = {
    "aLoRA": (lora(alora_invocation_tokens=[3, 4]), "aLoRA does not support merging"),
    "a bias without one to add it to": (lora(lora_bias=True), "the base layer has no bias"),
}


@pytest.mark.parametrize(("config", "told"), UNMERGEABLE.values(), ids=UNMERGEABLE)
def test_an_adapter_that_cannot_be_merged_is_named(config, told):
    parts = split_model(llama(), "1/2/1")
    injected(parts.trunk, config)
    with pytest.raises(ConfigError, match=rf"'model.layers.1.self_attn.q_proj': .*{told}"):
        join_model(parts.client, parts.trunk)


def test_adapters_without_a_merge_are_refused():
    config = peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    whole = random_model(LlamaConfig(**SMALL))
    peft.get_peft_model(whole, config)
    with pytest.raises(ConfigError, match=r"AdaptedAttention of peft\) cannot be merged"):
        folded_model(whole)


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
}


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "gpt_neox"])
def test_a_joined_model_is_written_as_transformers_writes_the_unsplit_one(model_type, tmp_path):
    whole = random_model(tiny_config(model_type, num_hidden_layers=4))
    whole.save_pretrained(tmp_path / "whole")
    sources = {"from memory": whole, "from files": str(tmp_path / "whole")}
    for name, source in sources.items():
        parts = split_model(source, "1/2/1")
        join_model(parts.client, parts.trunk).save_pretrained(tmp_path / name)
        assert _weights(tmp_path / name) == _weights(tmp_path / "whole")


def _weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_an_unsplit_model_with_adapters_is_written_under_the_names_of_its_family(tmp_path):
    whole = random_model(tiny_config("mixtral", num_hidden_layers=4))
    wanted = whole(IDS_BT).logits
    injected(whole, lora())
    for layer in layers(whole):
        layer.enable_adapters(False)
    folded_model(whole).save_pretrained(tmp_path)
    assert b"block_sparse_moe.experts.0.w1.weight" in _weights(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS_BT).logits, wanted)
