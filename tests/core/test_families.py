"""The unsplit model of every family of the suite judges its two parts, bit by bit."""

import json

import pytest
import torch

from fedsplit.errors import ConfigError
from fedsplit.model import model_class_for, split_model
from simulations.families import (
    Verdict,
    batches,
    closing_lines,
    difference,
    judge,
    main,
    random_model,
    time_limit,
)
from simulations.tiny import tiny_config
from tests.core.families import FAMILIES


def _whole(model_type, attention="eager", **fields):
    config = tiny_config(model_type, num_hidden_layers=4, **fields)
    return random_model(config, attn_implementation=attention)


def _attentions(model_type):
    family = model_class_for(tiny_config(model_type))
    return ["eager", "sdpa"] if family._supports_sdpa else ["eager"]


CASES = [(family, attention) for family in FAMILIES for attention in _attentions(family)]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("family", "attention"), CASES)
def test_logits_loss_and_every_gradient_are_equal(family, attention, tied):
    whole = _whole(family, attention, tie_word_embeddings=tied)
    parts = split_model(whole, "1/2/1")
    assert parts.client.config._attn_implementation == attention
    found = {name: difference(whole, parts, batch) for name, batch in batches(type(whole)).items()}
    assert found == {"none": 0.0, "right": 0.0, "left": 0.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_embeddings_stay_tied(family):
    whole = _whole(family, tie_word_embeddings=True)
    client = split_model(whole, "1/2/1").client
    assert client.get_output_embeddings().weight is client.get_input_embeddings().weight


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_blocks_are_noticed(family):
    whole = _whole(family)
    parts = split_model(whole, "1/2/1")
    blocks = parts.trunk.get_submodule(parts.trunk.plan.blocks)
    first, second = blocks[1].state_dict(), blocks[2].state_dict()
    swapped = {k: t.clone() for k, t in first.items()}
    blocks[1].load_state_dict(second)
    blocks[2].load_state_dict(swapped)
    assert difference(whole, parts, batches(type(whole))["none"]) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_equal(family):
    whole = _whole(family)
    client = split_model(whole, "1/2/1").client
    batch = batches(type(whole))["left"]
    asked = {
        "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 0),
        "attention_mask": batch["attention_mask"],
        "do_sample": False,
        "max_new_tokens": 12,
        "min_new_tokens": 12,
    }
    assert torch.equal(whole.generate(**asked), client.generate(**asked))


@pytest.mark.parametrize(
    ("model_type", "outcome", "detail"),
    [
        ("llama", "exact", ""),
        ("ctrl", "exact", ""),  # writes into its input
        ("mamba", "refused", "MambaForCausalLM: keeps its state in a cache of its own kind"),
        ("gemma3", "no tiny config", "made of several models"),
        ("youtu", "refused", "YoutuForCausalLM: its own loading unties 'lm_head.weight'"),
    ],
)
def test_a_verdict_says_why(model_type, outcome, detail):
    verdict = judge(model_type)
    assert verdict.outcome == outcome
    assert detail in verdict.detail


def test_the_script_prints_the_table_and_the_counts(capsys, tmp_path):
    main(["gpt2", "xlnet", "gemma3", "--json", str(tmp_path / "table.json")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [
        ["gpt2", "exact"],
        ["xlnet", "refused"],
        ["gemma3", "no"],
    ]
    assert lines[-1] == "families: 1 exact, 1 refused, 1 without a tiny config"
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["outcome"] for row in table] == ["exact", "refused", "no tiny config"]


def test_the_closing_line_counts_only_what_is_exact():
    outcomes = ["exact", "exact", "refused", "no tiny config", "differs", "failed"]
    verdicts = [Verdict(model_type=f"t{i}", outcome=o) for i, o in enumerate(outcomes)]
    assert closing_lines(verdicts).splitlines() == [
        "neither: t4 differs, t5 failed",
        "families: 2 exact, 1 refused, 1 without a tiny config",
    ]


def test_an_unknown_family_is_refused():
    with pytest.raises(ConfigError, match="family=gpt9 is not a model type of transformers"):
        tiny_config("gpt9")


def test_a_hanging_family_is_given_up():
    with pytest.raises(TimeoutError, match="not done in 0.01 s"), time_limit(0.01):
        while True:
            pass
