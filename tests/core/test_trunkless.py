"""The client's blocks without a trunk: a model of the family that passes the cut by."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedsplit.errors import UnsupportedModel
from fedsplit.model import connect, split_model
from fedsplit.model.trunkless import without_trunk
from simulations.families import batches, random_model
from simulations.tiny import tiny_config
from tests.core.families import FAMILIES


def _client(model_type):
    whole = random_model(tiny_config(model_type, num_hidden_layers=4), attn_implementation="eager")
    client = split_model(whole, "1/2/1").client
    connect(client, lambda smashed_BTD, *inputs, **named: smashed_BTD)
    return client


@pytest.mark.parametrize("model_type", FAMILIES)
def test_it_computes_what_the_client_does_whose_trunk_returns_its_input(model_type):
    client = _client(model_type)
    model = without_trunk(copy.deepcopy(client), attn_implementation="eager").eval()
    assert type(model) is client.family
    assert model.num_parameters() == client.num_parameters()
    batch = next(iter(batches(client.family).values()))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, client.eval()(**batch).logits)


def test_transformers_loads_it(tmp_path):
    model = without_trunk(_client("qwen3"), attn_implementation="eager")
    assert (model.config.num_hidden_layers, len(model.config.layer_types)) == (2, 2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_family_that_counts_its_blocks_otherwise_is_refused():
    client = _client("gpt2")
    client.config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace())
    with pytest.raises(UnsupportedModel, match="num_hidden_layers of its config is not the number"):
        without_trunk(client)
