"""The tokens of documents: of texts with special tokens, and of conversations.

Shapes: S tokens of a whole shard.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fedsplit.data.corpora import Corpus, Document
from fedsplit.errors import DataError
from fedsplit.spec import DataSpec

_WRITES_MASK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def special_token_options(special_tokens: str) -> dict[str, bool]:
    """Return the options of a tokenizer's call for a value of `DataSpec.special_tokens`."""
    own = special_tokens == "auto"
    return {"add_special_tokens": own, "split_special_tokens": not own}


def encode(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, data: DataSpec
) -> tuple[Tensor, Tensor]:
    """Return the tokens of all documents, one after another.

    A text ends with the end-of-text token, whether the tokenizer adds it or not. A conversation is
    what the tokenizer's chat template writes.

    Args:
        corpus: The documents.
        tokenizer: The model's tokenizer.
        data: `special_tokens` and `assistant_only_loss` are used.

    Returns:
        ids_S: int64.
        is_target_S: bool; whether the loss counts the prediction of this token.

    Raises:
        DataError: The tokenizer's chat template is missing, or it refuses a conversation, or the
            loss is to be on tokens of an assistant that cannot be told.
    """
    texts = [document.text for document in corpus.documents if not document.messages]
    if texts and data.assistant_only_loss:
        raise DataError(
            f"data.assistant_only_loss needs conversations, but {corpus.name} has texts; set "
            "data.field to a field with messages, or data.assistant_only_loss=false"
        )
    of_texts = _of_texts(texts, tokenizer, data.special_tokens)
    chats = {d: _chat(d, tokenizer, data) for d in corpus.documents if d.messages}
    ids = [chats[d].ids if d in chats else next(of_texts) for d in corpus.documents]
    ids_S = torch.tensor(list(chain.from_iterable(ids)), dtype=torch.int64)
    if not data.assistant_only_loss:
        return ids_S, torch.ones_like(ids_S, dtype=torch.bool)
    masks = chain.from_iterable(chats[d].mask_of_assistant() for d in corpus.documents)
    return ids_S, torch.tensor(list(masks), dtype=torch.bool)


def layout_of(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, data: DataSpec) -> str:
    """Return in words how documents become tokens, for the run's output."""
    if corpus.documents[0].messages:
        counted = "the assistant's" if data.assistant_only_loss else "all"
        return f"each conversation as the chat template writes it, with loss on {counted} tokens"
    (ids,) = _of_texts(["text"], tokenizer, data.special_tokens)
    special = set(tokenizer.all_special_ids)
    words = [str(tokenizer.decode([i])) if i in special else "TEXT" for i in ids]
    # The sample is several tokens.
    layout = " ".join(word for word, _ in groupby(words))
    spelled = "tokens" if data.special_tokens == "auto" else "text"
    return f"each document as {layout}; special tokens that a document spells are {spelled}"


def _of_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, special_tokens: str
) -> Iterator[list[int]]:
    if not texts:
        return
    encoded = tokenizer(texts, verbose=False, **special_token_options(special_tokens))
    end = tokenizer.eos_token_id
    for ids in encoded["input_ids"]:
        yield ids if ids and ids[-1] == end else [*ids, end]


def _chat(document: Document, tokenizer: PreTrainedTokenizerFast, data: DataSpec) -> "_Chat":
    if data.special_tokens == "none":
        raise DataError(
            f"{document.group} is a conversation, and chat templates write special tokens, which "
            "data.special_tokens=none reads as text; set data.special_tokens=auto"
        )
    return _Chat(document, tokenizer)


class _Chat:
    """A conversation, as the chat template of a tokenizer writes it."""

    def __init__(self, document: Document, tokenizer: PreTrainedTokenizerFast) -> None:
        self._document = document
        self._tokenizer: Any = tokenizer
        self._messages = [
            {"role": turn.role, "content": turn.content} for turn in document.messages
        ]
        self._template: str = self._call(tokenizer.get_chat_template)
        self._text = self._written(self._messages)
        encoded = self._tokenizer(
            self._text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        self.ids: list[int] = encoded["input_ids"]
        # Of characters, for each token.
        self._spans: list[tuple[int, int]] = encoded["offset_mapping"]

    def mask_of_assistant(self) -> list[bool]:
        """Return whether each token is of an assistant.

        Raises:
            DataError: The template does not tell, and writes turns in another way if others follow.
        """
        if _WRITES_MASK.search(self._template):
            encoded = self._call(
                self._tokenizer.apply_chat_template,
                self._messages,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            return [bool(own) for own in encoded["assistant_masks"]]
        spans = list(self._spans_of_assistant())
        return [
            any(first <= begin < end <= last for first, last in spans) for begin, end in self._spans
        ]

    def _spans_of_assistant(self) -> Iterator[tuple[int, int]]:
        """Yield the spans of characters that an assistant writes, with the ends of its turns."""
        for number, message in enumerate(self._messages):
            if message["role"] != "assistant":
                continue
            # A template cannot write a conversation without turns.
            before = self._written(self._messages[:number], prompt=True) if number else ""
            through = self._written(self._messages[: number + 1])
            if not (self._text.startswith(through) and through.startswith(before) and before):
                raise DataError(
                    f"{self._document.group}: the chat template writes message {number + 1} in "
                    "another way if it stands alone, so the assistant's tokens cannot be told; set "
                    "data.assistant_only_loss=false, or mark them in the template with "
                    "{% generation %}"
                )
            yield len(before), len(through)

    def _written(self, messages: list[dict[str, str]], prompt: bool = False) -> str:
        text: str = self._call(
            self._tokenizer.apply_chat_template,
            messages,
            tokenize=False,
            add_generation_prompt=prompt,
        )
        return text

    def _call(self, function: Any, *args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        # A template is code of the checkpoint: these are what it and transformers raise.
        except (TemplateError, ValueError, TypeError) as exc:
            raise DataError(
                f"{self._document.group} is a conversation that the tokenizer's chat template "
                f"cannot write: {str(exc).splitlines()[0]}"
            ) from exc
