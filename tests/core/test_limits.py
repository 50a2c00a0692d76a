"""A run whose tokens, classes or sequences do not fit its model is refused before it starts."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedTokenizerFast

from fedsplit.data import Corpus, Document, train_tokenizer
from fedsplit.errors import ConfigError
from fedsplit.model.dryrun import FAMILY_ERRORS
from fedsplit.model.limits import require_positions, require_rows
from fedsplit.model.plan import classifier_fields, model_class_for
from fedsplit.spec import RunSpec

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 257}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    documents = (Document(text="a b", group="g"),)
    return train_tokenizer(Corpus(name="sample", documents=documents), 257)  # a token is a byte


def config_of(family: str, **fields: Any) -> PretrainedConfig:
    return CONFIG_MAPPING[family](**{**SIZES, **fields})


def test_a_tokenizer_as_large_as_the_embedding_is_fine(tokenizer):
    require_rows(config_of("gpt2", bos_token_id=0, eos_token_id=256), tokenizer, ())


def test_an_added_token_without_a_row_is_refused(tokenizer):
    tokenizer.add_tokens(["<|user|>"])
    with pytest.raises(
        ConfigError,
        match=r"the tokenizer has 258 tokens, the last one '<\|user\|>' with number 257, but the "
        r"model's embedding has 257 rows \(vocab_size\); .* after resize_token_embeddings\(258\)",
    ):
        require_rows(config_of("gpt2", bos_token_id=0, eos_token_id=0), tokenizer, ())


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_a_special_token_of_the_config_without_a_row_is_refused(tokenizer, name):
    config = config_of("gpt2", **{"bos_token_id": 0, "eos_token_id": [0, 1], name: 50256})
    with pytest.raises(ConfigError, match=f"{name}=50256, but its embedding has 257 rows"):
        require_rows(config, tokenizer, ())


def test_more_classes_than_outputs_are_refused(tokenizer):
    config = config_of("bert", **classifier_fields(("a", "b", "c"), 0))
    require_rows(config, tokenizer, ("a", "b", "c"))
    config.num_labels = 2
    with pytest.raises(ConfigError, match="the data has 3 classes, but .* has num_labels=2"):
        require_rows(config, tokenizer, ("a", "b", "c"))


@pytest.mark.parametrize(
    ("family", "task", "fields"),
    [
        ("gpt2", "causal_lm", {"n_positions": 16}),
        ("opt", "causal_lm", {"max_position_embeddings": 16, "ffn_dim": 16}),
        ("gptj", "causal_lm", {"n_positions": 16, "rotary_dim": 4}),
        ("mpt", "causal_lm", {"max_seq_len": 16}),
        ("bert", "sequence_classification", {"max_position_embeddings": 16}),
        ("roberta", "sequence_classification", {"max_position_embeddings": 16, "pad_token_id": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_longest_sequence_is_the_longest_that_the_unsplit_model_takes(family, task, fields):
    config = config_of(family, **fields)
    whole = model_class_for(config, task)(config)
    run = RunSpec(task=task)

    def takes(length: int) -> bool:
        try:
            whole(input_ids=torch.full((1, length), 5))
        except FAMILY_ERRORS:
            return False
        return True

    def refusal(length: int) -> str:
        try:
            require_positions(replace(run, data=replace(run.data, sequence_length=length)), config)
        except ConfigError as error:
            return str(error)
        return ""

    lengths = range(12, 19)
    assert [not refusal(length) for length in lengths] == [takes(length) for length in lengths]
    longest = max(length for length in lengths if takes(length))
    found = refusal(18)
    assert re.match(rf"data.sequence_length=18, but the model has {longest} positions \(", found)
    assert found.endswith(f"=16); set data.sequence_length={longest} or less")


def test_rotary_positions_have_no_end_but_are_warned_about(caplog):
    config = config_of("llama", max_position_embeddings=16)
    require_positions(RunSpec(), config)
    assert "data.sequence_length=128 is more than the 16 positions" in caplog.text


def test_a_model_without_positions_takes_any_length(caplog):
    require_positions(RunSpec(), config_of("bloom"))
    assert not caplog.text
