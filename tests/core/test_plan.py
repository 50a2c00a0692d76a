"""What the dry run finds out about a model, and what it says of one that cannot be cut."""

import pytest
import torch
import transformers as hf

from fedsplit.errors import UnsupportedModel
from fedsplit.model import model_class_for, plan_for
from simulations.tiny import tiny_config


def test_a_plan_names_what_is_before_and_after_the_blocks(tiny_gpt2):
    plan = plan_for(hf.GPT2LMHeadModel, tiny_gpt2())
    assert (plan.backbone, plan.blocks, plan.num_blocks) == ("transformer", "transformer.h", 4)
    assert plan.before == ("transformer.wte", "transformer.wpe", "transformer.drop")
    assert set(plan.after) == {"transformer.ln_f", "lm_head"}
    assert plan.trunk_input == "inputs_embeds"


@pytest.mark.parametrize(
    ("model_type", "returns_tuple"), [("gpt2", False), ("llama", False), ("bloom", True)]
)
def test_a_plan_knows_what_blocks_return(model_type, returns_tuple):
    config = tiny_config(model_type)
    assert plan_for(model_class_for(config), config).returns_tuple is returns_tuple


def test_a_plan_is_found_once_and_leaves_the_config_alone(tiny_llama):
    config = tiny_llama(tie_word_embeddings=True)
    assert plan_for(hf.LlamaForCausalLM, config) is plan_for(hf.LlamaForCausalLM, config)
    assert config.tie_word_embeddings is True


def test_a_plan_takes_no_memory():
    seventy_billion = hf.LlamaConfig(
        hidden_size=8192, num_hidden_layers=80, intermediate_size=28672, num_attention_heads=64
    )
    assert plan_for(hf.LlamaForCausalLM, seventy_billion).num_blocks == 80


def test_a_plan_is_found_under_a_default_device():
    config = tiny_config("gemma2", num_hidden_layers=3)  # it makes a tensor of a constant
    with torch.device("meta"):
        assert plan_for(hf.Gemma2ForCausalLM, config).num_blocks == 3


def _small(config_class, **fields):
    sizes = dict(hidden_size=32, num_attention_heads=4, intermediate_size=64, vocab_size=99)
    return config_class(**{**sizes, "num_hidden_layers": 6, **fields})


def _gemma3n():
    return tiny_config("gemma3n_text", num_kv_shared_layers=2)


def _vision():
    return hf.Gemma3Config(
        text_config=tiny_config("gemma3_text").to_dict(),
        vision_config=dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            image_size=28, patch_size=14,
        ),
        mm_tokens_per_image=4,
    )  # fmt: skip


REFUSED = {
    "encoder-decoder": (
        hf.T5ForConditionalGeneration,
        lambda: hf.T5Config(d_model=32, num_layers=4, vocab_size=99),
        "T5ForConditionalGeneration: encoder-decoder",
    ),
    "shared layers": (
        hf.AlbertForSequenceClassification,
        lambda: _small(hf.AlbertConfig, embedding_size=16),
        "AlbertForSequenceClassification: expected one ModuleList of 6 layers, found []; "
        "its layers cannot be told apart",
    ),
    "side channel": (
        hf.MPNetForSequenceClassification,
        lambda: _small(hf.MPNetConfig),
        "MPNetForSequenceClassification: layers are handed 'argument 2', computed from weights, "
        "beside the hidden states",
    ),
    "shared keys": (
        hf.Gemma3nForCausalLM,
        _gemma3n,
        "Gemma3nForCausalLM: num_kv_shared_layers=2: layers share keys and values across the cut",
    ),
    "loose weights": (
        hf.XLNetLMHeadModel,
        lambda: tiny_config("xlnet"),
        "XLNetLMHeadModel: weights ['mask_emb'] sit directly on 'transformer', outside any "
        "sub-module",
    ),
    "own cache": (
        hf.MambaForCausalLM,
        lambda: tiny_config("mamba"),
        "MambaForCausalLM: keeps its state in a cache of its own kind",
    ),
    "router loss": (
        hf.MixtralForCausalLM,
        lambda: tiny_config("mixtral", output_router_logits=True),
        "MixtralForCausalLM: output_router_logits=True: the auxiliary loss needs the router "
        "logits of layers the client does not hold",
    ),
    "layer drop": (
        hf.OPTForCausalLM,
        lambda: tiny_config("opt", layerdrop=0.1),
        "OPTForCausalLM: layerdrop > 0 would drop the boundary itself; set it to 0",
    ),
    "several states": (
        hf.DebertaV2ForSequenceClassification,
        lambda: _small(hf.DebertaV2Config),
        "DebertaV2ForSequenceClassification: dry run failed (",
    ),
    "text and images": (
        hf.Gemma3ForConditionalGeneration,
        _vision,
        "Gemma3ForConditionalGeneration: 'model.vision_tower' has weights but never ran",
    ),
}


@pytest.mark.parametrize(("family", "config", "text"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_cut_is_refused_with_the_reason(family, config, text):
    with pytest.raises(UnsupportedModel) as refusal:
        plan_for(family, config())
    assert str(refusal.value).startswith(text)
    assert "\n" not in str(refusal.value)


CLASSES = {
    "causal_lm": (hf.GPT2Config, hf.GPT2LMHeadModel),
    "sequence_classification": (hf.BertConfig, hf.BertForSequenceClassification),
    "image_classification": (hf.DeiTConfig, hf.DeiTForImageClassification),
}


@pytest.mark.parametrize("task", CLASSES)
def test_a_task_decides_the_class(task):
    config_class, family = CLASSES[task]
    assert model_class_for(config_class(), task) is family


NO_CLASS = {
    "causal_lm": (hf.ViTConfig, "no causal language model for model type 'vit'"),
    "sequence_classification": (hf.ViTConfig, "no sequence classification model for model type"),
    "image_classification": (hf.BertConfig, "no image classification model for model type 'bert'"),
}


@pytest.mark.parametrize("task", NO_CLASS)
def test_a_config_without_a_model_for_the_task_is_refused(task):
    config_class, text = NO_CLASS[task]
    with pytest.raises(UnsupportedModel, match=text):
        model_class_for(config_class(), task)
