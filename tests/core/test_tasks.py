"""What each task makes of a shard: sequences, texts with a class, images with a class."""

import re

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, GPT2Config

from fedsplit.data import (
    TASKS,
    Corpus,
    Document,
    Labelled,
    evaluation_batches,
    tokenize,
    tokenizer_from_json,
    tokenizer_to_json,
    train_tokenizer,
    training_batches,
)
from fedsplit.errors import ConfigError, DataError
from fedsplit.spec import DataSpec, RunSpec

TEXTS, IMAGES = TASKS["sequence_classification"], TASKS["image_classification"]
SPEC = DataSpec(sequence_length=8)


def corpus_of(**texts: str) -> Corpus:
    """A document of each label."""
    documents = (Document(text=text, group=label, label=label) for label, text in texts.items())
    return Corpus(name="sample", documents=tuple(documents))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return corpus_of(b="some <|endoftext|> text", a="x" * 99, c="z")


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer(corpus, 257, begins_texts=True)  # a token is a byte


def test_a_run_takes_exactly_the_tasks_that_there_are():
    with pytest.raises(ConfigError) as refusal:
        RunSpec(task="nonsense")
    assert set(re.findall(r"\w+_\w+", str(refusal.value))) == set(TASKS)


@pytest.mark.parametrize(
    ("task", "logits", "labels", "num_predictions", "num_correct"),
    [
        ("causal_lm", torch.eye(3)[None], torch.tensor([[9, 0, -100]]), 1, 0),
        ("sequence_classification", torch.eye(3), torch.tensor([0, 2, 2]), 3, 2),
        ("image_classification", torch.eye(3), torch.tensor([0, 1, 2]), 3, 3),
    ],
)
def test_a_task_counts_its_predictions(task, logits, labels, num_predictions, num_correct):
    assert TASKS[task].num_predictions(labels) == num_predictions
    assert TASKS[task].counts(logits, labels)["correct"] == num_correct


def test_without_labels_a_shard_becomes_sequences(corpus, tokenizer):
    found = TASKS["causal_lm"].examples(corpus, SPEC, tokenizer, ())
    assert torch.equal(found.ids_NT, tokenize(corpus, tokenizer, SPEC).ids_NT)


def test_texts_are_cut_and_padded_to_one_length(corpus, tokenizer):
    batch = TEXTS.examples(corpus, SPEC, tokenizer, ("a", "b", "c")).batch([2, 0, 1])
    ids_BT, mask_BT = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    assert ids_BT.shape == mask_BT.shape == (3, 8)
    assert mask_BT.sum(1).tolist() == [2, 8, 8]
    assert ids_BT[:, 0].eq(tokenizer.eos_token_id).all()
    assert [tokenizer.decode(ids_T[1:]) for ids_T in ids_BT[1:]] == ["some <|endoftext|> ", "x" * 7]
    assert ids_BT[0, 2:].eq(tokenizer.pad_token_id).all()
    assert batch.labels.tolist() == [2, 1, 0]
    assert (batch.num_tokens, batch.num_bytes) == (3, 0)


def test_a_classifier_has_no_loss_on_an_assistant(corpus, tokenizer):
    with pytest.raises(DataError, match="data.assistant_only_loss is for language models"):
        TEXTS.examples(corpus, DataSpec(assistant_only_loss=True), tokenizer, ("a", "b", "c"))


def test_a_text_has_the_special_tokens_that_a_pipeline_gives_it(corpus, tokenizer):
    batch = TEXTS.examples(corpus, DataSpec(), tokenizer, ("a", "b", "c")).batch([0])
    (length,) = batch.inputs["attention_mask"].sum(dim=1).tolist()
    ids = tokenizer(corpus.documents[0].text)["input_ids"]
    assert batch.inputs["input_ids"][0, :length].tolist() == ids
    assert ids.count(tokenizer.eos_token_id) == 2


def test_without_special_tokens_a_text_that_spells_the_end_of_text_is_text(tokenizer):
    one = corpus_of(a="<|endoftext|>")
    spec = DataSpec(special_tokens="none")
    (row,) = TEXTS.examples(one, spec, tokenizer, ("a",)).batch([0]).inputs["input_ids"].tolist()
    assert row.index(tokenizer.eos_token_id) == len("<|endoftext|>")


def test_padding_is_at_the_right_whatever_the_tokenizer_prefers(corpus, tokenizer):
    left = tokenizer_from_json(tokenizer_to_json(tokenizer))
    left.padding_side = "left"
    mask_BT = (
        TEXTS.examples(corpus, SPEC, left, ("a", "b", "c")).batch([2]).inputs["attention_mask"]
    )
    assert mask_BT.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("config", [BertConfig(), GPT2Config()], ids=["bert", "gpt2"])
def test_a_saved_tokenizer_begins_texts_as_in_training(corpus, tokenizer, config, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("x z")["input_ids"] == tokenizer("x z")["input_ids"]
    assert loaded("x z")["input_ids"][0] == tokenizer.eos_token_id


def test_a_tokenizer_for_language_models_adds_nothing(corpus):
    plain = train_tokenizer(corpus, 257)
    assert plain("x z")["input_ids"] == plain("x z", add_special_tokens=False)["input_ids"]


def test_images_are_one_gray_channel():
    pixels = [tuple((row * 9 + i) / 18 for i in range(9)) for row in range(2)]
    documents = tuple(
        Document(text="", group=str(i), label="ab"[i], pixels=own) for i, own in enumerate(pixels)
    )
    images = IMAGES.examples(Corpus(name="i", documents=documents), SPEC, None, ("a", "b"))
    batch = images.batch([1])
    assert batch.inputs["pixel_values"].dtype == torch.float32
    expected = [2 * pixel - 1 for pixel in pixels[1]]
    assert batch.inputs["pixel_values"].shape == (1, 1, 3, 3)
    assert batch.inputs["pixel_values"].flatten().tolist() == pytest.approx(expected)
    assert batch.labels.tolist() == [1]
    assert (batch.num_tokens, batch.num_bytes) == (1, 0)


def test_a_class_that_the_run_does_not_know_is_refused(corpus, tokenizer):
    with pytest.raises(
        DataError, match="sample has documents of class 'b', but the classes of this run are a, c;"
    ):
        TEXTS.examples(corpus, SPEC, tokenizer, ("a", "c"))


def test_no_documents_is_an_error(tokenizer):
    with pytest.raises(DataError, match="sample has no documents; every client needs at least one"):
        TEXTS.examples(corpus_of(), SPEC, tokenizer, ("a",))


def test_batches_are_served_of_labelled_rows():
    labelled = Labelled(inputs={"x": torch.arange(5) * 10}, labels_N=torch.arange(5))
    served = list(evaluation_batches(labelled, 2))
    assert [batch.labels.tolist() for batch in served] == [[0, 1], [2, 3], [4]]
    assert [batch.num_tokens for batch in served] == [2, 2, 1]
    order = [
        batch
        for batch in training_batches(labelled, batch_size=5, num_batches=2, seed=1, start=0)
        if torch.equal(batch.inputs["x"], batch.labels * 10)
    ]
    assert [sorted(batch.labels.tolist()) for batch in order] == [[0, 1, 2, 3, 4]] * 2
