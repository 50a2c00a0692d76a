"""The bodies of answers, whole or as the chunks of a stream, for both kinds of requests."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from fedsplit.openai.choices import Piece, TokenLogprob
from fedsplit.openai.requests import ChatRequest, Sampling
from fedsplit.openai.text import INCOMPLETE

Body = dict[str, Any]


class Answer(ABC):
    """The answer to one request; a subclass writes one kind of answer.

    Args:
        model: The model's id.
        request: The request.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, model: str, request: Sampling) -> None:
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._has_logprobs = request.num_logprobs >= 0
        self._includes_usage = request.includes_usage
        self._num_choices = request.n or 1
        # By the number of a prompt, of which there are several in a request for completions.
        self._num_prompt: dict[int, int] = {}
        self._num_cached: dict[int, int] = {}
        self._num_tokens: dict[int, int] = {}
        self._begun: set[int] = set()

    def chunks(self, piece: Piece) -> list[Body]:
        """Return the chunks of a stream for a piece: in a chat, a choice begins with its role."""
        self._count(piece)
        choices = []
        if piece.choice not in self._begun:
            self._begun.add(piece.choice)
            choices += self._opening(piece.choice)
        if piece.text or piece.tokens:
            choices.append(self._part(piece, None))
        if piece.finish:
            choices.append(self._part(replace(piece, text="", tokens=()), piece.finish))
        usage = {"usage": None} if self._includes_usage else {}
        return [self._body(self.chunk_kind, [choice]) | usage for choice in choices]

    def last_chunks(self) -> list[Body]:
        """Return the chunk with the numbers of tokens, if the request asks for it."""
        if not self._includes_usage:
            return []
        return [self._body(self.chunk_kind, []) | {"usage": self._usage}]

    def whole(self, pieces: Sequence[Piece]) -> Body:
        """Return the answer as one object."""
        by_choice: dict[int, list[Piece]] = {}
        for piece in pieces:
            self._count(piece)
            by_choice.setdefault(piece.choice, []).append(piece)
        choices = [self._choice(_joined(by_choice[number])) for number in sorted(by_choice)]
        return self._body(self.kind, choices) | {"usage": self._usage}

    def _count(self, piece: Piece) -> None:
        self._num_tokens[piece.choice] = piece.num_tokens
        prompt = piece.choice // self._num_choices
        self._num_prompt[prompt], self._num_cached[prompt] = piece.num_prompt, piece.num_cached

    @property
    def _usage(self) -> Body:
        prompt, new = sum(self._num_prompt.values()), sum(self._num_tokens.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached.values())},
        }

    def _body(self, kind: str, choices: list[Body]) -> Body:
        return {**self._head, "object": kind, "choices": choices}

    @abstractmethod
    def _opening(self, choice: int) -> list[Body]:
        """What a stream says before the first text of a choice."""

    @abstractmethod
    def _part(self, piece: Piece, finish: str | None) -> Body:
        """A piece of a choice in a stream."""

    @abstractmethod
    def _choice(self, piece: Piece) -> Body:
        """A whole choice."""


class ChatAnswer(Answer):
    """The answer to a conversation."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _opening(self, choice: int) -> list[Body]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}]

    def _part(self, piece: Piece, finish: str | None) -> Body:
        return {
            "index": piece.choice,
            "delta": {} if finish else {"content": piece.text},
            "logprobs": None if finish else self._logprobs(piece),
            "finish_reason": finish,
        }

    def _choice(self, piece: Piece) -> Body:
        return {
            "index": piece.choice,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish,
        }

    def _logprobs(self, piece: Piece) -> Body | None:
        if not self._has_logprobs:
            return None
        return {"content": [_chat_token(token) for token in piece.tokens], "refusal": None}


class TextAnswer(Answer):
    """The continuations of prompts."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, request: Sampling) -> None:
        super().__init__(model, request)
        self._lengths: dict[int, int] = {}

    def _opening(self, choice: int) -> list[Body]:
        return []

    def _part(self, piece: Piece, finish: str | None) -> Body:
        return {
            "index": piece.choice,
            "text": piece.text,
            "logprobs": None if finish else self._logprobs(piece),
            "finish_reason": finish,
        }

    def _choice(self, piece: Piece) -> Body:
        return self._part(piece, None) | {"finish_reason": piece.finish}

    def _logprobs(self, piece: Piece) -> Body | None:
        if not self._has_logprobs:
            return None
        offsets = []
        for token in piece.tokens:
            offset = self._lengths.get(piece.choice, 0)
            offsets.append(offset)
            self._lengths[piece.choice] = offset + len(token.text)
        return {
            "tokens": [token.text for token in piece.tokens],
            "token_logprobs": [token.logprob for token in piece.tokens],
            "top_logprobs": [dict(token.top) for token in piece.tokens],
            "text_offset": offsets,
        }


def answer_to(request: Sampling, model: str) -> Answer:
    """Return the answer to fill for a request."""
    return (ChatAnswer if isinstance(request, ChatRequest) else TextAnswer)(model, request)


def _joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of a choice as one."""
    return replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        tokens=tuple(token for piece in pieces for token in piece.tokens),
    )


def _chat_token(token: TokenLogprob) -> Body:
    top = [_likely(text, logprob) for text, logprob in token.top]
    return _likely(token.text, token.logprob) | {"top_logprobs": top}


def _likely(text: str, logprob: float) -> Body:
    # A token that is a part of a character has no text of its own.
    data = None if INCOMPLETE in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": data}
