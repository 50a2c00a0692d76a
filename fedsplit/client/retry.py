"""How a client tries again: full jitter, growing, bounded in time, always the same request."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from fedsplit.errors import FedsplitError, Internal

T = TypeVar("T")

_FIRST_S, _MOST_S = 0.2, 10.0


class Retry:
    """Repeats what failed in a way that may pass; a fault of the other side, once.

    Source: "Exponential backoff and jitter", Brooker 2015 (full jitter).

    Args:
        budget_s: Longest time from the first attempt to the last, in seconds.
        chance: Randomness of the waits.
        sleep: Waits, in seconds.
        clock: Seconds that do not run backwards.
    """

    def __init__(
        self,
        budget_s: float,
        chance: random.Random,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget_s = budget_s
        self._chance = chance
        self._sleep = sleep
        self._clock = clock

    def __call__(self, attempt: Callable[[], T]) -> T:
        """Call `attempt` until it succeeds, fails for good, or the budget is used up.

        Raises:
            FedsplitError: The last failure.
        """
        begin, tries, faults = self._clock(), 0, 0
        while True:
            try:
                return attempt()
            except FedsplitError as failure:
                wait = failure.retry_after_s or self._wait_s(tries)
                is_fault = isinstance(failure, Internal)
                faults += is_fault
                may_pass = failure.retryable or (is_fault and faults == 1)
                if not may_pass or self._clock() + wait - begin > self._budget_s:
                    raise
            self._sleep(wait)
            tries += 1

    def pause(self, tries: int) -> None:
        """Wait as after `tries` attempts that failed."""
        self._sleep(self._wait_s(tries))

    def _wait_s(self, tries: int) -> float:
        return self._chance.uniform(0.0, min(_MOST_S, _FIRST_S * 2**tries))
