"""Training reads a document as generation does: the tokenizer of transformers is the judge."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from fedsplit.data import TASKS, Corpus, Document, Turn, layout_of, load_corpus, train_tokenizer
from fedsplit.errors import ConfigError, DataError
from fedsplit.model.build import split_model
from fedsplit.spec import DataSpec
from simulations.families import random_model
from simulations.tiny import tiny_config

TASK = TASKS["causal_lm"]
MARKS = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
PLAIN = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}\n"
    "{% else %}<|user|>{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
)
# As templates that remove the reasoning of all turns but the last.
UNSTABLE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ '!' if loop.last }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHATS = (
    ("user", "to be"),
    ("assistant", "or not to be"),
    ("user", "that is"),
    ("assistant", "the question"),
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama's: it begins a text with <s> and does not end it."""
    backend = train_tokenizer(texts("to be or not to be"), 280).backend_tokenizer
    backend.add_special_tokens(MARKS)
    begin = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    made.chat_template = PLAIN
    return made


def texts(*documents: str) -> Corpus:
    found = (Document(text=text, group=str(i)) for i, text in enumerate(documents))
    return Corpus(name="sample", documents=tuple(found))


def chats(number: int = 1) -> Corpus:
    turns = tuple(Turn(role=role, content=content) for role, content in CHATS)
    found = (Document(text="", group=f"chats:{i}", messages=turns) for i in range(number))
    return Corpus(name="sample", documents=tuple(found))


def read(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, **settings: object):
    """One row with all tokens, and the labels that are not ignored."""
    data = DataSpec(**{"sequence_length": 512, **settings})
    batch = TASK.examples(corpus, data, tokenizer, ()).batch([0])
    length = int(batch.inputs["attention_mask"].sum())
    return batch.inputs["input_ids"][0, :length].tolist(), batch.labels[0, :length].tolist()


def applied(tokenizer: PreTrainedTokenizerFast, **options: object) -> dict[str, list[int]]:
    messages = [{"role": role, "content": content} for role, content in CHATS]
    return dict(tokenizer.apply_chat_template(messages, return_dict=True, **options))


# --- texts -----------------------------------------------------------------------------------


def test_a_text_is_what_the_tokenizer_makes_of_it_and_an_end(tokenizer):
    ids, labels = read(texts("to be", "<|user|>or not</s>"), tokenizer)
    end = tokenizer.eos_token_id
    first, second = tokenizer("to be")["input_ids"], tokenizer("<|user|>or not</s>")["input_ids"]
    assert ids == labels == [*first, end, *second]
    assert ids.count(tokenizer.bos_token_id) == 2
    assert tokenizer.convert_tokens_to_ids("<|user|>") in ids


def test_without_special_tokens_all_characters_are_text(tokenizer):
    ids, _ = read(texts("<|user|>or not</s>"), tokenizer, special_tokens="none")
    special = set(tokenizer.all_special_ids) | set(tokenizer.convert_tokens_to_ids(MARKS))
    assert [i for i in ids if i in special] == ids[-1:] == [tokenizer.eos_token_id]
    assert tokenizer.decode(ids[:-1]) == "<|user|>or not</s>"


@pytest.mark.parametrize(
    ("special_tokens", "layout"),
    [
        ("auto", "each document as <s> TEXT </s>; special tokens that a document spells are tok"),
        ("none", "each document as TEXT </s>; special tokens that a document spells are text"),
    ],
)
def test_the_run_tells_the_layout(tokenizer, special_tokens, layout):
    data = DataSpec(special_tokens=special_tokens)
    assert layout_of(texts("to be"), tokenizer, data).startswith(layout)


def test_no_other_choice_is_taken():
    with pytest.raises(ConfigError, match="data.special_tokens='all' is not one of: auto, none"):
        DataSpec(special_tokens="all")


# --- conversations ---------------------------------------------------------------------------


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_a_conversation_is_what_the_chat_template_writes(tokenizer, template):
    tokenizer.chat_template = template
    ids, labels = read(chats(), tokenizer)
    assert ids == labels == applied(tokenizer)["input_ids"]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_the_loss_can_be_on_the_assistant_alone(tokenizer, template):
    tokenizer.chat_template = template
    ids, labels = read(chats(), tokenizer, assistant_only_loss=True)
    assert ids == applied(tokenizer)["input_ids"]
    counted = tokenizer.decode([label for label in labels if label != -100])
    # What a turn adds includes the line end after it; generation blocks leave it out.
    ending = "<|end|>\n" if template is PLAIN else "<|end|>"
    assert counted == "".join(f"{text}{ending}" for role, text in CHATS if role == "assistant")
    if template is MARKED:
        mask = applied(tokenizer, return_assistant_tokens_mask=True)["assistant_masks"]
        assert [label != -100 for label in labels] == [bool(own) for own in mask]


def test_a_batch_of_conversations_has_the_unsplit_model_s_loss(tokenizer):
    config = tiny_config("llama", num_hidden_layers=4, vocab_size=len(tokenizer))
    whole = random_model(config)
    parts = split_model(whole, "1/*/1")
    tokenizer.chat_template = MARKED
    told = applied(tokenizer, return_assistant_tokens_mask=True)
    ids_BT, mask_BT = (torch.tensor([told[name]]) for name in ("input_ids", "assistant_masks"))
    expected = whole(input_ids=ids_BT, labels=ids_BT.masked_fill(mask_BT == 0, -100)).loss
    data = DataSpec(sequence_length=ids_BT.shape[1], assistant_only_loss=True)
    batch = TASK.examples(chats(), data, tokenizer, ()).batch([0])
    assert batch.num_tokens == int(mask_BT.sum())
    assert torch.equal(parts.client(**batch.inputs, labels=batch.labels).loss, expected)


def test_sequences_without_a_counted_token_are_left_out(tokenizer):
    tokenizer.chat_template = MARKED
    data = DataSpec(sequence_length=8, assistant_only_loss=True)
    rows = TASK.examples(chats(3), data, tokenizer, ())
    assert 0 < len(rows) < len(TASK.examples(chats(3), DataSpec(sequence_length=8), tokenizer, ()))
    assert all(rows.batch([row]).num_tokens for row in range(len(rows)))


REFUSED = {
    "unstable": (UNSTABLE, {"assistant_only_loss": True}, "chats:0: the chat template writes mess"),
    "no template": (None, {}, "chats:0 is a conversation that .* chat template cannot write: "),
    "refusing": ("{{ raise_exception('roles must alternate') }}", {}, "roles must alternate$"),
    "as text": (PLAIN, {"special_tokens": "none"}, "which data.special_tokens=none reads as text"),
}


@pytest.mark.parametrize(("template", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_a_conversation_that_cannot_be_read_is_refused(tokenizer, template, settings, message):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=message):
        read(chats(), tokenizer, **settings)


def test_texts_have_no_assistant(tokenizer):
    with pytest.raises(DataError, match="assistant_only_loss needs conversations, but sample has"):
        read(texts("to be"), tokenizer, assistant_only_loss=True)


# --- reading conversations -------------------------------------------------------------------


def test_a_list_of_messages_is_a_conversation(tmp_path: Path):
    path = tmp_path / "chats.jsonl"
    messages = [{"role": role, "content": text, "tool_calls": None} for role, text in CHATS]
    path.write_text("\n".join(json.dumps({"messages": messages}) for _ in range(2)))
    corpus = load_corpus(DataSpec(kind="jsonl", path=str(path), field="messages"))
    assert [document.messages for document in corpus.documents] == [
        document.messages for document in chats(2).documents
    ]
    assert corpus.num_bytes == 2 * sum(len(text) for _, text in CHATS)


BAD_MESSAGES = {
    "no role": ([{"content": "a"}], "message 1 has no role and content alone: found"),
    "tools": ([{"role": "user", "content": "a", "tool_calls": [1]}], "message 1 has no role"),
    "text": (["a"], "message 1 has no role and content alone: found 'a'; a conversation is a list"),
    "parts": ([{"role": "user", "content": [1]}], r"field 'content' is not a string: found '\[1"),
}


@pytest.mark.parametrize(("messages", "error"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_other_messages_are_refused_by_line(tmp_path: Path, messages, error):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"text": messages}))
    with pytest.raises(DataError, match=f"chats.jsonl, line 1.*{error}"):
        load_corpus(DataSpec(kind="jsonl", path=str(path)))


def test_a_classifier_reads_no_conversations(tmp_path: Path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"text": [], "label": "a"}))
    with pytest.raises(DataError, match="is a conversation, and a classifier reads texts"):
        load_corpus(DataSpec(kind="jsonl", path=str(path)), "sequence_classification")
