"""Tokenizers are deterministic and travel; packing loses no byte; batches count what they hold."""

import subprocess
import sys
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from fedsplit.data import (
    Corpus,
    Document,
    Sequences,
    evaluation_batches,
    load_corpus,
    load_tokenizer,
    tokenize,
    tokenizer_from_json,
    tokenizer_to_json,
    train_tokenizer,
    training_batches,
)
from fedsplit.data.tokenizing import token_bytes, without_long_words
from fedsplit.errors import DataError
from fedsplit.spec import DataSpec

STRANGE = "h\u00e9 \u6f22\u5b57 \U0001f600\tx\r\n  y <|endoftext|> z"


def corpus_of(*texts: str) -> Corpus:
    documents = tuple(Document(text=text, group=str(i)) for i, text in enumerate(texts))
    return Corpus(name="sample", documents=documents)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(load_corpus(DataSpec()), 512)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


# --- training a tokenizer --------------------------------------------------------------------


def test_vocabulary_is_as_large_as_asked_for(tokenizer):
    assert len(tokenizer) == 512
    assert len(train_tokenizer(corpus_of("too little text"), 257)) == 257
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"


@given(st.text())
def test_any_text_survives(tokenizer, text):
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_a_vocabulary_beyond_the_corpus_takes_no_memory():
    corpus = corpus_of("to be or not to be")
    assert len(train_tokenizer(corpus, 10**15)) == len(train_tokenizer(corpus, 1000))


@pytest.mark.slow
def test_same_corpus_same_tokenizer_in_another_process(tokenizer):
    code = (
        "import gc; gc.disable()  # it would take a fifth of the time of the imports\n"
        "from fedsplit.data import *; from fedsplit.spec import DataSpec\n"
        "print(tokenizer_to_json(train_tokenizer(load_corpus(DataSpec()), 512)), end='')"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout == tokenizer_to_json(tokenizer)


@pytest.mark.parametrize("unit", ["x", "7", "=-", "\n", " "], ids=repr)
def test_a_word_of_many_letters_is_trained_in_pieces(unit):
    word = (unit * 100_000)[:100_000]
    text = f"ordinary text {word}, and more"
    pieces = list(without_long_words(text))
    assert "".join(pieces) == text
    assert [len(piece) for piece in pieces[1:-1]] == [1000] * (len(pieces) - 2)
    assert len(pieces[0]) <= 1014 and len(pieces) in (100, 101)
    assert len(train_tokenizer(corpus_of(text), 300)) <= 300


def test_ordinary_text_is_trained_as_it_is():
    for document in load_corpus(DataSpec()).documents:
        assert list(without_long_words(document.text)) == [document.text]


# --- saving, loading, travelling -------------------------------------------------------------


@pytest.mark.parametrize("with_config", [False, True], ids=["alone", "beside_a_llama"])
def test_auto_tokenizer_loads_what_was_saved(tokenizer, tmp_path, with_config):
    tokenizer.save_pretrained(tmp_path)
    if with_config:
        LlamaConfig().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert encode(loaded, STRANGE) == encode(tokenizer, STRANGE)
    assert loaded.eos_token_id == loaded.pad_token_id == tokenizer.eos_token_id


def test_json_round_trip(tokenizer):
    again = tokenizer_from_json(tokenizer_to_json(tokenizer))
    assert encode(again, STRANGE) == encode(tokenizer, STRANGE)
    assert again.eos_token == again.pad_token == tokenizer.eos_token
    assert tokenizer_to_json(again) == tokenizer_to_json(tokenizer)


@pytest.mark.parametrize(
    "text",
    [
        *("", "no json", "[1]", "{}", '{"pipeline": "", "special": 1}'),
        pytest.param("[" * 100_000, id="brackets"),
    ],
)
def test_json_of_something_else_is_refused(text):
    with pytest.raises(DataError, match="the message has no tokenizer of fedsplit: found '"):
        tokenizer_from_json(text)


def test_load_tokenizer_pads_with_eos_where_there_is_no_padding(tokenizer, tmp_path):
    saved = tokenizer_from_json(tokenizer_to_json(tokenizer))
    saved.pad_token = None
    saved.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token is None
    assert load_tokenizer(str(tmp_path)).pad_token == "<|endoftext|>"


def test_load_tokenizer_needs_an_end_of_text(tokenizer, tmp_path):
    saved = tokenizer_from_json(tokenizer_to_json(tokenizer))
    saved.eos_token = None
    saved.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"has no end-of-text token \(eos_token\); set one"):
        load_tokenizer(str(tmp_path))


def test_load_tokenizer_from_nowhere(tmp_path):
    with pytest.raises(DataError, match=f"model.pretrained={tmp_path} has no tokenizer to load"):
        load_tokenizer(str(tmp_path))


# --- bytes of tokens -------------------------------------------------------------------------


@given(st.text())
def test_bytes_of_byte_level_tokens_are_exact(tokenizer, text):
    bytes_V = token_bytes(tokenizer)
    assert bytes_V[encode(tokenizer, text)].sum() == len(text.encode())


def test_special_tokens_stand_for_no_bytes(tokenizer):
    assert token_bytes(tokenizer)[tokenizer.eos_token_id] == 0


def test_bytes_of_a_sentencepiece_vocabulary():
    pieces = {"<unk>": 0, "</s>": 1, "\u2581": 2, "a": 3, "\u2581a": 4, "<0xC3>": 5, "<0xA9>": 6}
    merges = [("\u2581", "a")]
    backend = Tokenizer(models.BPE(pieces, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )
    assert token_bytes(tokenizer).tolist() == [0, 0, 1, 1, 2, 1, 1]
    text = "a a \u00e9"
    assert token_bytes(tokenizer)[encode(tokenizer, text)].sum() == len(text.encode())


# --- packing ---------------------------------------------------------------------------------

texts = st.text("ab \u00e9\n", min_size=1, max_size=60)


@given(texts=st.lists(texts, min_size=1, max_size=6), length=st.integers(2, 17))
def test_packing_loses_nothing(tokenizer, texts, length):
    sequences = tokenize(corpus_of(*texts), tokenizer, DataSpec(sequence_length=length))
    packed = [
        token
        for ids_T, used in zip(sequences.ids_NT, sequences.lengths_N.tolist(), strict=True)
        for token in ids_T[:used].tolist()
    ]
    strung = list(
        chain.from_iterable([*encode(tokenizer, t), tokenizer.eos_token_id] for t in texts)
    )
    assert packed in (strung, strung[:-1])
    assert sequences.lengths_N[:-1].eq(length).all()
    assert 2 <= sequences.lengths_N[-1] <= length


def test_a_lone_end_of_text_is_left_out(tokenizer):
    length = len(encode(tokenizer, "abab"))
    sequences = tokenize(corpus_of("abab"), tokenizer, DataSpec(sequence_length=length))
    assert sequences.ids_NT.tolist() == [encode(tokenizer, "abab")]


@pytest.mark.parametrize(("special_tokens", "count"), [("auto", 2), ("none", 1)])
def test_a_document_that_spells_the_end_of_text(tokenizer, special_tokens, count):
    data = DataSpec(special_tokens=special_tokens)
    sequences = tokenize(corpus_of("a<|endoftext|>b"), tokenizer, data)
    ids = sequences.ids_NT[0, : sequences.lengths_N[0]].tolist()
    assert ids.count(tokenizer.eos_token_id) == count


def test_no_documents_is_an_error(tokenizer):
    with pytest.raises(DataError, match="sample has no documents; every client needs at least one"):
        tokenize(corpus_of(), tokenizer, DataSpec())


# --- batches ---------------------------------------------------------------------------------


def numbered(num_sequences: int, last: int = 4) -> Sequences:
    """Sequences of 4 tokens; those of sequence n are n, and token n stands for n bytes."""
    lengths_N = torch.full((num_sequences,), 4)
    lengths_N[-1] = last
    ids_NT = torch.arange(num_sequences)[:, None].repeat(1, 4)
    return Sequences(
        ids_NT=ids_NT,
        is_target_NT=torch.arange(4) < lengths_N[:, None],
        lengths_N=lengths_N,
        bytes_V=torch.arange(num_sequences),
    )


def rows(batches) -> list[list[int]]:
    return [batch.inputs["input_ids"][:, 0].tolist() for batch in batches]


def test_batch_marks_and_ignores_padding():
    batch = numbered(3, last=2).batch([1, 2])
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels.tolist() == [[1, 1, 1, 1], [2, 2, -100, -100]]
    assert batch.num_tokens == int((batch.labels[:, 1:] != -100).sum()) == 4
    assert batch.num_bytes == 3 * 1 + 1 * 2
    for tensor in (batch.inputs["input_ids"], batch.inputs["attention_mask"], batch.labels):
        assert tensor.dtype == torch.int64


def test_every_byte_but_a_sequences_first_token_is_counted(tokenizer):
    corpus = load_corpus(DataSpec())
    sequences = tokenize(corpus, tokenizer, DataSpec())
    counted = sum(batch.num_bytes for batch in evaluation_batches(sequences, 16))
    not_predicted = int(sequences.bytes_V[sequences.ids_NT[:, 0]].sum())
    assert counted + not_predicted == corpus.num_bytes


def test_evaluation_serves_every_sequence_once_in_order():
    assert rows(evaluation_batches(numbered(5), 2)) == [[0, 1], [2, 3], [4]]


@given(
    size=st.integers(1, 9),
    batch_size=st.integers(1, 12),
    cut=st.integers(0, 10),
    seed=st.integers(0, 5),
)
def test_the_stream_goes_on_from_any_batch(size, batch_size, cut, seed):
    def served(start: int, num_batches: int) -> list[list[int]]:
        return rows(
            training_batches(
                numbered(size),
                batch_size=batch_size,
                num_batches=num_batches,
                seed=seed,
                start=start,
            )
        )

    whole = served(0, 10)
    assert whole == served(0, cut) + served(cut, 10 - cut)
    assert [len(batch) for batch in whole] == [batch_size] * 10


@given(size=st.integers(1, 9), seed=st.integers(0, 5))
def test_every_epoch_serves_every_sequence(size, seed):
    stream = training_batches(
        numbered(size), batch_size=1, num_batches=3 * size, seed=seed, start=0
    )
    order = [row for (row,) in rows(stream)]
    for epoch in range(3):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_seeds_and_epochs_have_orders_of_their_own():
    def epoch(seed: int, number: int) -> list[list[int]]:
        return rows(
            training_batches(numbered(50), batch_size=50, num_batches=1, seed=seed, start=number)
        )

    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != epoch(1, 0)
