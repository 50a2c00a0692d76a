"""Draft tokens of a client: guesses from its texts, as many as are worth their time.

A guess is the token that followed the same tokens last time, in this text or an earlier one of
the client (prompt lookup of Saxena 2023, with a memory over texts). `generate` verifies guesses, so
they change no token of greedy decoding. Shapes: B sequences (always one), T tokens, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import PretrainedConfig
from transformers.generation.candidate_generator import CandidateGenerator

_LONGEST = 4
"""The most tokens that a guess follows."""

_MOST = 10
"""The most guesses for a pass."""

_ENTRIES = 1 << 20
"""The most entries of a memory, about 150 bytes each; a memory that is full begins anew."""

_WORK_OF_TOKEN = 1 / 8
"""The time of one more token in a pass, relative to a pass of one token.

A pass of few tokens takes the time of reading the weights, and little more for each token. This is
a value for CPUs: the layers of SmolLM2 in float32 on two cores take about a tenth more.
"""

_KEPT = 0.9
"""The weight of all earlier passes relative to the last one, in the measured times."""


class Drafts:
    """Makes the draft tokens of a client's texts; implements `fedsplit.model.drafting.Drafter`.

    A guess is used where it saves more time than its computation takes. So with a trunk nearby,
    there are few drafts. Several threads may use it.

    Args:
        config: The model's config.
        round_trip_s: The seconds of a request to the trunk that computes nothing.
        clock: Seconds that do not run backwards.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        round_trip_s: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config = config
        self.memory = Memory()
        self.pace = Pace(round_trip_s)
        self.clock = clock

    def new_text(self, max_length: int) -> CandidateGenerator:
        """See `Drafter`."""
        return _TextDrafts(self, max_length)


class Memory:
    """The token that followed each sequence of up to four tokens last time."""

    def __init__(self) -> None:
        self._next: dict[tuple[int, ...], int] = {}
        # Before anything is known, a guess after n tokens is right in n of 6 cases.
        self._right = [float(n) for n in range(_LONGEST + 1)]
        self._all = [_LONGEST + 2.0] * (_LONGEST + 1)

    def add(self, ids_T: list[int], start: int, *, is_prompt: bool) -> None:
        """Remember the tokens of a text from `start` on, and whether they were guessed rightly."""
        if len(self._next) > _ENTRIES:
            self._next = {}
        for end in range(max(1, start), len(ids_T)):
            before_T, token = ids_T[max(0, end - _LONGEST) : end], ids_T[end]
            guess, n = self.guess(before_T)
            # Prompts repeat other things than answers, such as their template.
            if n and not is_prompt:
                self._all[n] += 1
                self._right[n] += guess == token
            for first in range(len(before_T)):
                self._next[tuple(before_T[first:])] = token

    def guess(self, before_T: list[int]) -> tuple[int, int]:
        """Return a guess, and how many tokens before it the memory knows; 0 if there is none."""
        for n in range(min(_LONGEST, len(before_T)), 0, -1):
            token = self._next.get(tuple(before_T[-n:]))
            if token is not None:
                return token, n
        return 0, 0

    def chance(self, n: int) -> float:
        """Return the probability that a guess after `n` known tokens is right."""
        return self._right[n] / self._all[n]


class Pace:
    """The measured times of passes.

    Args:
        round_trip_s: The seconds of a request to the trunk that computes nothing.
    """

    def __init__(self, round_trip_s: float) -> None:
        self._round_trip_s = round_trip_s
        self._passes = self._tokens = self._seconds = self._work_s = 0.0

    def add(self, sent: int, gained: int, seconds: float) -> None:
        """Count a pass.

        Args:
            sent: The tokens in the pass.
            gained: The tokens of the text that it gave.
            seconds: The time from its begin to its reply.
        """
        work_s = max(0.0, seconds - self._round_trip_s) / (1 + (sent - 1) * _WORK_OF_TOKEN)
        self._passes = _KEPT * self._passes + 1
        self._tokens = _KEPT * self._tokens + gained
        self._seconds = _KEPT * self._seconds + seconds
        self._work_s = _KEPT * self._work_s + work_s

    @property
    def worth(self) -> float:
        """The probability from which on a guess gives more tokens than its time would otherwise."""
        if not self._seconds:
            return 1.0
        token_s = self._work_s / self._passes * _WORK_OF_TOKEN
        return token_s * self._tokens / self._seconds


class _TextDrafts(CandidateGenerator):
    """The drafts of one text."""

    def __init__(self, drafts: Drafts, max_length: int) -> None:
        self._memory = drafts.memory
        self._pace = drafts.pace
        self._clock = drafts.clock
        self._max_length = max_length
        self._ids_T: list[int] = []
        self._num_drafts = 0
        self._passes = 0
        self._began = 0.0

    def get_candidates(self, input_ids: LongTensor, **_: object) -> tuple[LongTensor, Any]:
        """Return the text with the guesses that are worth their time; they have no logits."""
        known = len(self._ids_T)
        self._ids_T += input_ids[0, known:].tolist()
        self._memory.add(self._ids_T, known, is_prompt=not self._passes)
        guesses = list(self._guesses())
        self._num_drafts = len(guesses)
        self._began = self._clock()
        text_BT: Any = torch.cat((input_ids, input_ids.new_tensor([guesses])), dim=1)
        return text_BT, None

    def update_candidate_strategy(
        self, input_ids: LongTensor, scores: Tensor, num_matches: int
    ) -> None:
        """Learn the time of a pass."""
        # The pass of the prompt has another time than those of the next tokens.
        if self._passes:
            seconds = self._clock() - self._began
            self._pace.add(1 + self._num_drafts, 1 + num_matches, seconds)
        self._passes += 1

    def _guesses(self) -> Iterator[int]:
        before_T, chance, worth = self._ids_T[-_LONGEST:], 1.0, self._pace.worth
        # A pass gives one token more than it has guesses.
        for _ in range(min(_MOST, self._max_length - len(self._ids_T) - 1)):
            token, n = self._memory.guess(before_T)
            chance *= self._memory.chance(n)
            if not n or chance < worth:
                return
            yield token
            before_T = [*before_T, token]
