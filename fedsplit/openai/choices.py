"""The choices of an answer: what each of them says so far, and when it is finished.

Shapes: B sequences, T tokens, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import PreTrainedTokenizerFast, StoppingCriteria

from fedsplit.openai.lanes import Cancelled, Lane
from fedsplit.openai.sampling import Probabilities
from fedsplit.openai.text import StopStrings, TextDecoder


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token of an answer with its log probability, and the most likely ones at its place."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The next text of a choice.

    Attributes:
        choice: The number of the choice.
        text: The text, of whole characters; it may be empty.
        tokens: The tokens since the last piece, if the request asks for probabilities.
        finish: At the end of the choice, `stop` or `length`; empty before it.
        num_tokens: The tokens of the choice so far.
        num_prompt: The tokens of its prompt.
        num_cached: How many of these a cache has held.
    """

    choice: int
    text: str
    tokens: tuple[TokenLogprob, ...]
    finish: str
    num_tokens: int
    num_prompt: int
    num_cached: int


class Choice:
    """One text of an answer.

    Args:
        number: Its number among all choices of the answer.
        tokenizer: The model's tokenizer.
        prompt: The tokens of its prompt.
        cached: How many of these a cache has held.
        stops: The strings that end it.
        ends: The tokens that end it.
        limit: The most tokens.
        num_logprobs: How many alternatives each token has; -1 without probabilities.
    """

    def __init__(
        self,
        number: int,
        tokenizer: PreTrainedTokenizerFast,
        *,
        prompt: int,
        cached: int,
        stops: Sequence[str],
        ends: Collection[int],
        limit: int,
        num_logprobs: int,
    ) -> None:
        self._number = number
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._cached = cached
        self._ends = ends
        self._limit = limit
        self._num_logprobs = num_logprobs
        self._decoder = TextDecoder(tokenizer)
        self._stops = StopStrings(stops)
        self._tokens: list[TokenLogprob] = []
        self._num_tokens = 0
        self.finished = False

    def push(self, token: int, logprobs_V: Tensor | None) -> Piece | None:
        """Add a token; return what can be said of the text now, if there is any."""
        self._num_tokens += 1
        is_end = token in self._ends
        if not is_end and logprobs_V is not None:
            self._tokens.append(self._with_logprobs(token, logprobs_V))
        text, is_stopped = ("", False) if is_end else self._stops.push(self._decoder.push(token))
        finish = "stop" if is_end or is_stopped else ""
        if not finish and self._num_tokens == self._limit:
            finish = "length"
        if finish and not is_stopped:
            # Incomplete characters may complete a stop string, as any text does.
            rest, is_stopped = self._stops.push(self._decoder.rest())
            text += rest if is_stopped else rest + self._stops.rest()
        self.finished = bool(finish)
        if not text and not finish:
            return None
        tokens, self._tokens = tuple(self._tokens), []
        return Piece(
            choice=self._number,
            text=text,
            tokens=tokens,
            finish=finish,
            num_tokens=self._num_tokens,
            num_prompt=self._prompt,
            num_cached=self._cached,
        )

    def _with_logprobs(self, token: int, logprobs_V: Tensor) -> TokenLogprob:
        top = logprobs_V.topk(self._num_logprobs) if self._num_logprobs else None
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True) if top else ()
        return TokenLogprob(
            text=self._text(token),
            logprob=float(logprobs_V[token]),
            top=tuple((self._text(other), value) for other, value in pairs),
        )

    def _text(self, token: int) -> str:
        text = self._tokenizer.decode([token])
        assert isinstance(text, str), "one sequence has one text"
        return text


class Progress(StoppingCriteria):
    """Follows a generation token by token: passes on pieces, and ends what is finished.

    A streamer of transformers takes one sequence only, and cannot end it.

    Args:
        choices: The choices, one for each sequence.
        kept: The probabilities of the next tokens.
        lane: The lane of the generation, which ends when it is cancelled.
        emit: Gets each piece at once.
        prompt: The number of tokens of the prompt.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        kept: Probabilities,
        lane: Lane,
        emit: Callable[[Piece], None],
        *,
        prompt: int,
    ) -> None:
        self._choices = choices
        self._kept = kept
        self._lane = lane
        self._emit = emit
        self._num_seen = prompt

    def __call__(self, input_ids: LongTensor, scores: Any, **kwargs: Any) -> Any:
        """Whether each sequence is finished, after its last tokens were chosen.

        Raises:
            Cancelled: The lane was cancelled, so the texts have no end.
        """
        if self._lane.cancelled:
            raise Cancelled
        # One token, or several with drafts.
        new_BT, self._num_seen = input_ids[:, self._num_seen :], input_ids.shape[1]
        for row, (choice, tokens) in enumerate(zip(self._choices, new_BT.tolist(), strict=True)):
            for token in tokens:
                # The tokens after the end are padding, or what another choice waits for.
                if choice.finished:
                    break
                logprobs_BV = self._kept.logprobs_BV
                piece = choice.push(token, logprobs_BV[row] if logprobs_BV.numel() else None)
                if piece:
                    self._emit(piece)
        finished = [choice.finished for choice in self._choices]
        return torch.tensor(finished, device=input_ids.device)
