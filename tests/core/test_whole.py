"""The unsplit model of a baseline: what transformers loads, whether or not it could be cut."""

from dataclasses import replace

import pytest
import torch
import transformers as hf

from fedsplit.errors import UnsupportedModel
from fedsplit.model.describe import config_of, whole_of
from fedsplit.model.plan import model_class_for, plan_for
from fedsplit.spec import ModelSpec, RunSpec
from simulations.tiny import tiny_config


def tiny_bert() -> hf.PretrainedConfig:
    return hf.BertConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )


CHECKPOINTS = {
    "weights outside the blocks": (
        lambda: hf.XLNetLMHeadModel(tiny_config("xlnet")),
        "causal_lm",
        0,
    ),
    "a cache of its own": (lambda: hf.MambaForCausalLM(tiny_config("mamba")), "causal_lm", 0),
    "without the language head": (lambda: hf.LlamaModel(tiny_config("llama")), "causal_lm", 1),
    "without the pooler and the head": (
        lambda: hf.BertModel(tiny_bert(), add_pooling_layer=False),
        "sequence_classification",
        4,
    ),
}


@pytest.mark.parametrize(("model", "task", "missing"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_the_unsplit_model_of_a_checkpoint_is_what_transformers_loads(
    model, task, missing, tmp_path
):
    model().save_pretrained(tmp_path)
    run = replace(
        RunSpec(seed=3, task=task), model=ModelSpec(pretrained=str(tmp_path), attention="auto")
    )
    config = config_of(run, None)
    torch.manual_seed(run.seed)  # of the weights that are missing
    judge, report = model_class_for(config, task).from_pretrained(
        tmp_path, config=config, output_loading_info=True
    )
    assert len(report["missing_keys"]) == missing
    random_state = torch.get_rng_state()
    whole = whole_of(run, config)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert type(whole) is type(judge)
    assert whole.state_dict().keys() == judge.state_dict().keys()
    for name, tensor in judge.state_dict().items():
        assert torch.equal(whole.state_dict()[name], tensor), name


@pytest.mark.parametrize("model_type", ["xlnet", "mamba"])
def test_these_models_cannot_be_cut(model_type):
    config = tiny_config(model_type)
    with pytest.raises(UnsupportedModel):
        plan_for(model_class_for(config, "causal_lm"), config)
