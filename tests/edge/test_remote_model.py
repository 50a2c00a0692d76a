"""`remote_model` without a session of the user's: what it computes is the unsplit model's."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
    pipeline,
)

from fedsplit.errors import FedsplitError, ProtocolError, TooLarge
from fedsplit.serve import Served, hosted, reach, remote_model
from fedsplit.spec import GenerationSpec, RunSpec, SplitSpec, WireSpec
from tests.core.generating import prompt
from tests.edge.tiny_models import make_model

SENTENCES = ["Once upon a time", "The with statement", "No", "A class is a group of objects"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A language model, and a classifier of the same config."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    config = AutoModelForCausalLM.from_pretrained(folder / "model").config
    config.pad_token_id, config.num_labels = tokenizer.pad_token_id, 3
    torch.manual_seed(1)
    classifier = LlamaForSequenceClassification(config)
    for matrix in (p for p in classifier.parameters() if p.ndim > 1):
        torch.nn.init.normal_(matrix, std=0.3)
    classifier.save_pretrained(folder / "classifier")
    tokenizer.save_pretrained(folder / "classifier")
    return folder


@pytest.fixture(scope="module")
def address(folder) -> Iterator[str]:
    """A server of both, for clients of any run; a forward of a training client is short."""
    served = [Served(name=name, model=str(folder / name)) for name in ("model", "classifier")]
    run = RunSpec(split=SplitSpec.parse("1/2/1"), generation=GenerationSpec(session_tokens=1024))
    with hosted(served, run, WireSpec(bind="127.0.0.1:0")) as address:
        yield address


def test_logits_are_those_of_the_unsplit_model(folder, address):
    """Of more and longer sequences than a training batch has, and with padding on the left."""
    model = remote_model(str(folder / "model"), address)
    whole = AutoModelForCausalLM.from_pretrained(folder / "model")
    for ids_BT in (prompt(6, rows=2, pad=3), prompt(200), prompt(40, rows=20)):
        inputs = {"input_ids": ids_BT, "attention_mask": (ids_BT != 0).long(), "labels": ids_BT}
        got, wanted = model(**inputs, use_cache=False), whole(**inputs, use_cache=False)
        torch.testing.assert_close(got.logits, wanted.logits)
        torch.testing.assert_close(got.loss, wanted.loss)


def test_tokens_without_a_cache_are_those_of_the_unsplit_model(folder, address):
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": False}
    model = remote_model(str(folder / "model"), address)
    whole = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert torch.equal(model.generate(prompt(), **options), whole.generate(prompt(), **options))


def test_a_pipeline_classifies_as_with_the_unsplit_model(folder, address):
    source, task = str(folder / "classifier"), "text-classification"
    run = RunSpec(task="sequence_classification")
    model = remote_model(source, address, served_model_name="classifier", run=run)
    whole = AutoModelForSequenceClassification.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    got, wanted = (
        pipeline(task, model=each, tokenizer=tokenizer)(SENTENCES, batch_size=2, top_k=None)
        for each in (model, whole)
    )
    for ours, theirs in zip(got, wanted, strict=True):
        assert [each["label"] for each in ours] == [each["label"] for each in theirs]
        assert [each["score"] for each in ours] == pytest.approx([x["score"] for x in theirs], 1e-4)


def test_a_lost_session_is_opened_again(folder, address):
    model = remote_model(str(folder / "model"), address)
    first_BTV = model(prompt(), use_cache=False).logits
    trunk = model.remote.connection.carry._trunk
    trunk._close(trunk._named_session())
    assert torch.equal(model(prompt(), use_cache=False).logits, first_BTV)


def test_the_link_is_closed_with_the_model(folder, address):
    model = remote_model(str(folder / "model"), address)
    model(prompt(), use_cache=False)
    trunk = model.remote.connection.carry._trunk
    del model
    gc.collect()
    with pytest.raises(FedsplitError):
        trunk.open()


def test_it_does_not_train(folder, address):
    model = remote_model(str(folder / "model"), address)
    loss = model(prompt(), labels=prompt(), use_cache=False).loss
    with pytest.raises(ProtocolError, match="training=True"):
        loss.backward()


def test_who_trains_and_opens_no_session_is_told(folder, address):
    with reach(str(folder / "model"), address) as reached:
        with pytest.raises(ProtocolError, match=r"use `with trunk.session\(\):` or trunk.open"):
            reached.model(prompt(), labels=prompt(), use_cache=False)


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: model(prompt(200, rows=6), use_cache=False),
        lambda model: model.generate(prompt(200, rows=6), max_new_tokens=1),
        lambda model: model.generate(
            prompt(40, rows=6), max_new_tokens=200, cache_implementation="static"
        ),
    ],
    ids=["forward", "prompt", "cache"],
)
def test_what_is_too_large_names_the_setting(folder, address, ask):
    model = remote_model(str(folder / "model"), address)
    with pytest.raises(TooLarge, match="raise generation.session_tokens at the trunk"):
        ask(model)
