"""The requests of one client: sent, sent again if need be, and answered whole.

A request that is repeated is the same request, so the trunk runs it once. Retries use full jitter
with a growing bound (Brooker 2015, "Exponential backoff and jitter") and end with a budget of time.
"""

import random
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from fedsplit.client.pipeline import MicroBatchPipeline
from fedsplit.errors import (
    ActivationExpired,
    FedsplitError,
    HistoryLost,
    Internal,
    StaleVersion,
)
from fedsplit.link import Link
from fedsplit.randomness import rng_released
from fedsplit.spec import RunSpec
from fedsplit.wire import messages as m
from fedsplit.wire.delta import DeltaEncoder

T = TypeVar("T")

_REFORWARDS = 6
"""How often an expired graph is made again before its backward fails."""

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 10.0


class RpcClient:
    """Sends a client's requests to its trunk.

    Args:
        link: Leads to the trunk.
        run: How long to retry, and how many micro-batches of a step are under way at a time.
        client: The client's name.
        encoder: Encodes what training forwards carry.
    """

    def __init__(self, link: Link, run: RunSpec, *, client: str, encoder: DeltaEncoder) -> None:
        self._link = link
        self._encoder = encoder
        self._pipeline = MicroBatchPipeline(link, run.train.micro_batches)
        self._retry = Retry(run.wire.budget_s, random.Random(client))

    def run_pieces(self, pieces: Sequence[Callable[[], T]]) -> list[T]:
        """Run the micro-batches of a step, several at a time; what each returned."""
        return self._pipeline.run(pieces)

    def exchange(self, request: m.Request[m.R]) -> m.R:
        """Send a request, again if need be, and wait for its reply.

        Raises:
            FedsplitError: The last failure.
        """
        with rng_released():
            return self._retry(lambda: self._link.exchange(request))

    def exchange_in_turn(self, request: m.Request[m.R]) -> m.R:
        """As `exchange`; the other micro-batches of the step run meanwhile."""
        with rng_released():
            first = self._pipeline.begin(request) if self._pipeline.is_worker else None
            return self._retry(lambda: self._link.exchange(request), first=first)

    def forward(self, request: m.ForwardRequest) -> m.ForwardReply:
        """Send a training forward, in turn; its reply, decoded."""
        try:
            reply = self.exchange_in_turn(request)
        except HistoryLost:
            reply = self.exchange(self._encoder.with_references(request))
        return self._encoder.decode(request, reply) if request.is_delta else reply

    def backward(
        self, backward: m.BackwardRequest, forward: m.ForwardRequest, version: int
    ) -> m.BackwardReply:
        """Send a backward, in turn; if its graph has expired, the forward is sent again before.

        Args:
            backward: The request.
            forward: The forward before it, as it was sent.
            version: The trunk's version that answered the forward.

        Raises:
            StaleVersion: The graph expired, and the trunk has moved on.
        """
        for tries in range(_REFORWARDS):
            try:
                return self.exchange(backward) if tries else self.exchange_in_turn(backward)
            except ActivationExpired:
                if tries:  # other clients need the trunk's memory as well
                    self._retry.pause(tries)
                now = self._forward_again(forward).version
                if now != version:
                    raise StaleVersion(
                        f"the graph of call {forward.call} expired, and the trunk has moved from "
                        f"version {version} to {now} meanwhile; repeat the step"
                    ) from None
        return self.exchange(backward)

    def _forward_again(self, request: m.ForwardRequest) -> m.ForwardReply:
        try:
            return self.exchange(request)
        except HistoryLost:
            return self.exchange(self._encoder.with_references(request))


class Retry:
    """Repeats an attempt that failed in a way that can pass; a fault of the server, once.

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

    def __call__(self, attempt: Callable[[], T], *, first: Callable[[], T] | None = None) -> T:
        """Call `attempt` until it succeeds, fails for good, or the budget is used up.

        Args:
            attempt: Makes one attempt.
            first: Makes the first one, if that is another.

        Raises:
            FedsplitError: The last failure.
        """
        begin, tries, faults = self._clock(), 0, 0
        while True:
            try:
                return first() if first and not tries else attempt()
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
        return self._chance.uniform(0.0, min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**tries))
