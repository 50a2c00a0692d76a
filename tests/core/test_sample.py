"""The sample at the end of a run: what the unsplit model writes, and nothing else changes."""

import pytest
import torch
from transformers import GPT2LMHeadModel

from fedsplit.data import train_tokenizer
from fedsplit.data.corpora import Corpus, Document
from fedsplit.model.build import split_model
from fedsplit.model.join import join_model
from fedsplit.runs import sample
from fedsplit.runs.metrics import closing_table
from fedsplit.runs.sample import SAMPLE_TOKENS, sample_of
from fedsplit.telemetry.round import RoundStats
from simulations.families import random_model


@pytest.fixture
def tokenizer():
    corpus = Corpus(name="x", documents=(Document(text="the cat sat on the mat " * 9, group="x"),))
    return train_tokenizer(corpus, 270)


@pytest.fixture
def whole(tiny_gpt2, tokenizer) -> GPT2LMHeadModel:
    return random_model(tiny_gpt2(vocab_size=len(tokenizer), n_positions=64))


def test_a_sample_is_what_generate_gives_the_unsplit_model(whole, tokenizer):
    parts = split_model(whole, "1/2/1")
    before = torch.get_rng_state()
    written = sample_of(join_model(parts.client, parts.trunk).train(), tokenizer, 64)
    assert torch.equal(torch.get_rng_state(), before)
    start = torch.tensor([[end := tokenizer.eos_token_id]])
    torch.manual_seed(0)
    told = whole.generate(
        start, max_new_tokens=SAMPLE_TOKENS, do_sample=True, top_k=0, suppress_tokens=[end],
        pad_token_id=end, attention_mask=torch.ones_like(start),
    )  # fmt: skip
    text = " ".join(tokenizer.decode(told[0], skip_special_tokens=True).split())
    assert written == "".join(c if c.isprintable() else "\ufffd" for c in text) != ""


def test_a_model_that_writes_none_is_no_error(whole, tokenizer, monkeypatch, caplog):
    assert len(sample_of(whole, tokenizer, 4)) < len(sample_of(whole, tokenizer, 64))
    whole.transformer.ln_f.weight.data = torch.ones(3)
    assert sample_of(whole, tokenizer, 64) is None
    assert "the trained model writes no sample: " in caplog.text
    monkeypatch.setattr(sample, "MAX_PARAMETERS", 10)
    caplog.clear()
    assert sample_of(whole, tokenizer, 64) is None and not caplog.text


def test_the_closing_table_shows_the_sample():
    rounds = [RoundStats(**dict.fromkeys(RoundStats.__dataclass_fields__, 1) | {"by_client": {}})]
    assert 'sample of its text              "a b"' in closing_table(rounds, sample="a b")
    assert "sample" not in closing_table(rounds)
