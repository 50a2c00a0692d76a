"""The tokens of prompts in a pass: few while sessions decode, by the time that passes take."""

from collections import deque
from collections.abc import Callable, Collection

from fedsplit.trunk.pass_queue import Pending, shares_of

SHORT = 16
"""A pass runs requests of so many tokens at once, because they cost little more than one token."""

_SAMPLES = 3
_LEAST_STEP, _LARGEST_STEP = 0.5, 1.25
# The time of a pass without prompts changes with the number of sessions and of their tokens.
_PASSES_PER_SAMPLE = 32


class PromptBudget:
    """Decides how many tokens of prompts a pass runs.

    While sessions decode, prompts may take as long as all else in a pass, so the time between the
    tokens of these sessions about doubles. Both times are measured: that of passes without prompts,
    and what prompts added to the last pass. If no session decodes, a pass runs `most_tokens` tokens
    of prompts.

    Args:
        most_tokens: The most tokens of prompts in a pass.

    Attributes:
        short: The most tokens of a short request; all other requests are prompts.
    """

    def __init__(self, most_tokens: int) -> None:
        self.short = min(SHORT, most_tokens)
        self._most = most_tokens
        self._tokens = self.short
        self._prompt_tokens = self._num_short = 0
        self._alone_s: deque[float] = deque(maxlen=_SAMPLES)
        self._passes_left = 0

    def shares(
        self,
        waiting: Collection[Pending],
        *,
        decoding: bool,
        room_bytes: int,
        can_divide: Callable[[Pending], bool],
    ) -> list[tuple[Pending, int]]:
        """Return the requests of the next pass, each with the number of tokens that it runs.

        Args:
            waiting: The requests, the most urgent first.
            decoding: Whether other sessions are likely to send their next token soon.
            room_bytes: The bytes of all caches of the pass.
            can_divide: Whether a prompt may run in pieces.
        """
        any_short = any(each.is_short(self.short) for each in waiting)
        shares = shares_of(
            waiting,
            short=self.short,
            prompt_tokens=self._next_tokens(any_short) if decoding or any_short else self._most,
            room_bytes=room_bytes,
            can_divide=can_divide,
        )
        prompts = [(each, tokens) for each, tokens in shares if not each.is_short(self.short)]
        self._num_short = len(shares) - len(prompts)
        self._prompt_tokens = sum(each.rows * tokens for each, tokens in prompts)
        return shares

    def _next_tokens(self, any_short: bool) -> int:
        # Without a sample, the pass takes one.
        return 0 if any_short and not self._passes_left else self._tokens

    def end(self, seconds: float) -> None:
        """Learn from the time of the last pass."""
        # A pass that answers nobody may still compute on its device.
        if not self._num_short:
            return
        if not self._prompt_tokens:
            self._alone_s.append(seconds)
            self._passes_left = _PASSES_PER_SAMPLE
        elif self._alone_s:
            self._passes_left = max(0, self._passes_left - 1)
            # The shortest of a few, because other programs can only make a pass longer.
            alone_s = min(self._alone_s)
            fitting = self._prompt_tokens * alone_s / max(seconds - alone_s, 1e-9)
            # In small steps upwards, because one pass may be fast by chance.
            fitting = min(max(fitting, self._tokens * _LEAST_STEP), self._tokens * _LARGEST_STEP)
            self._tokens = round(min(max(fitting, self.short), self._most))
