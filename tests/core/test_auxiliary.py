"""The head that a bottom trains on by itself."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BertForSequenceClassification

from fedsplit.errors import ConfigError
from fedsplit.model import initial_parts, join_model
from fedsplit.model.auxiliary import AuxiliaryHead, add_auxiliary_head, auxiliary_head_of
from fedsplit.model.checkpoint import join_checkpoint
from fedsplit.model.lora import add_adapters, trainable
from fedsplit.spec import LoraSpec, SplitSpec
from simulations.tiny import tiny_config
from tests.core.worlds import batch, same

CUT = SplitSpec.parse("1/*/1")
OWN = {f"auxiliary.{name}" for name in ("norm.weight", "norm.bias", "head.weight", "head.bias")}


def with_head(config, task="causal_lm", seed=0, **options):
    parts = initial_parts(config, CUT, 0, **options)
    add_auxiliary_head(parts.client, task, seed)
    return parts


def test_it_trains_with_the_bottom_and_predicts_every_next_token(tiny_gpt2):
    parts = with_head(tiny_gpt2())
    assert {name for name in trainable(parts.client) if "auxiliary" in name} == OWN
    assert {parts.client.place_of(name.rpartition(".")[0]) for name in OWN} == {"bottom"}
    parts.client(**batch().inputs)
    assert auxiliary_head_of(parts.client)().shape == (2, 12, 64)


def test_it_goes_by_its_seed_and_leaves_the_random_state_alone(tiny_llama):
    state = torch.get_rng_state()
    heads = [auxiliary_head_of(with_head(tiny_llama(), seed=s).client) for s in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert same(heads[0].state_dict(), heads[1].state_dict())
    assert not same(heads[0].state_dict(), heads[2].state_dict())


def test_it_is_no_part_of_the_joined_model(tiny_gpt2, tmp_path):
    parts, without = with_head(tiny_gpt2()), initial_parts(tiny_gpt2(), CUT, 0)
    wanted = join_model(without.client, without.trunk).state_dict()
    assert same(join_model(parts.client, parts.trunk).state_dict(), wanted)
    join_checkpoint(parts.client, parts.trunk, tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(read.state_dict(), wanted)


def test_it_trains_beside_adapters(tiny_llama):
    parts = initial_parts(tiny_llama(), CUT, 0)
    add_adapters(parts.client, LoraSpec(enabled=True, rank=2))
    add_auxiliary_head(parts.client, "causal_lm", 0)
    names = set(trainable(parts.client))
    assert {name for name in names if "lora_" not in name} == OWN
    wanted = join_model(parts.client, parts.trunk).state_dict()
    assert not any("auxiliary" in name for name in wanted)


def test_of_a_classifier_it_pools_the_tokens_that_are_no_padding():
    config = tiny_config("bert", num_hidden_layers=4, num_labels=3)
    parts = with_head(config, "sequence_classification", model_class=BertForSequenceClassification)
    parts.client.eval()
    head = auxiliary_head_of(parts.client)

    def logits(tokens, pad):
        inputs = batch(rows=1, tokens=tokens).inputs
        ids_BT = torch.nn.functional.pad(inputs["input_ids"], (0, pad))
        mask_BT = torch.nn.functional.pad(inputs["attention_mask"], (0, pad))
        parts.client(input_ids=ids_BT, attention_mask=mask_BT)
        return head(mask_BT)

    assert logits(8, 0).shape == (1, 3)
    torch.testing.assert_close(logits(8, 0), logits(8, 4))


def test_without_a_mask_it_pools_all_tokens():
    head = AuxiliaryHead(4, 3, pools=True)
    hidden_BTD = torch.randn(2, 5, 4)
    head.note(head, (hidden_BTD,))
    everywhere = head(torch.ones(2, 5))
    head.note(head, (hidden_BTD,))
    torch.testing.assert_close(head(), everywhere)


def test_it_has_the_models_dtype(tiny_llama):
    parts = with_head(tiny_llama(), dtype=torch.bfloat16)
    parts.client(**batch().inputs)
    assert auxiliary_head_of(parts.client)().dtype == torch.bfloat16


def test_it_predicts_once_from_each_forward_that_trains(tiny_llama):
    parts = with_head(tiny_llama())
    head = auxiliary_head_of(parts.client)
    parts.client(**batch().inputs)
    head()
    with pytest.raises(ConfigError, match="run the client's forward first"):
        head()
    with torch.no_grad():
        parts.client(**batch().inputs)
    with pytest.raises(ConfigError, match="with gradients enabled"):
        head()


def test_a_client_without_one_says_so(tiny_llama):
    with pytest.raises(ConfigError, match=r"call add_auxiliary_head\(client, run.task, run.seed\)"):
        auxiliary_head_of(initial_parts(tiny_llama(), CUT, 0).client)
