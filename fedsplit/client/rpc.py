"""The requests of one client: sends them, retries them, and decodes their replies.

A retry repeats the identity of its request (session, call, kind), so the trunk runs it once. The
waits use full jitter with a growing bound (Brooker 2015, "Exponential backoff and jitter"), within
a time budget.
"""

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from fedsplit.client.pipeline import MicroBatchPipeline
from fedsplit.errors import (
    ActivationExpired,
    FedsplitError,
    HistoryLost,
    Internal,
    ModelMismatch,
    StaleVersion,
)
from fedsplit.link import Link
from fedsplit.randomness import rng_released
from fedsplit.spec import RunSpec
from fedsplit.telemetry.context import working_on
from fedsplit.telemetry.spans import span
from fedsplit.wire import messages as m
from fedsplit.wire.delta import DeltaEncoder

T = TypeVar("T")

log = logging.getLogger(__name__)

_REFORWARDS = 6
"""How often a forward is repeated because its graph has expired, before the backward fails."""

# With the backoff of gRPC, a client is back within 5 s of a server that was away for long.
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 3.0


class RpcClient:
    """Sends a client's requests to its trunk.

    Args:
        link: The link to the trunk.
        run: The run; it sets the retry budget and the number of micro-batches in progress.
        client: The client's name.
        encoder: The delta codec of training forwards.
    """

    def __init__(self, link: Link, run: RunSpec, *, client: str, encoder: DeltaEncoder) -> None:
        self._link = link
        self._client = client
        self._encoder = encoder
        self._pipeline = MicroBatchPipeline(link, run.train.micro_batches)
        # Each client has its own jitter, or all would come back at once after an outage.
        self._retry = Retry(run.wire.budget_s, random.Random(client))

    def run_pieces(self, pieces: Sequence[Callable[[], T]]) -> list[T]:
        """Run the micro-batches of a step, several at a time; return their results."""
        return self._pipeline.run(pieces)

    def exchange(self, request: m.Request[m.R], *, in_turn: bool = False) -> m.R:
        """Send a request, retry it if need be, and return its reply.

        Args:
            request: The request.
            in_turn: Whether the other micro-batches of the step run meanwhile.

        Raises:
            FedsplitError: The last failure.
        """
        session, call = getattr(request, "session", ""), getattr(request, "call", None)
        with (
            working_on(client=self._client, session=session, call=call),
            span(self._link.telemetry, request.kind),
            # Other clients in this process may draw random numbers while this one waits.
            rng_released(),
        ):
            takes_turn = in_turn and self._pipeline.is_worker
            first = self._pipeline.begin(request) if takes_turn else None
            return self._retry(partial(self._link.exchange, request), first=first)

    def open(self, request: m.OpenRequest, settings: dict[str, Any]) -> m.OpenReply:
        """As `exchange`; an error for another model or run names the settings that differ."""
        try:
            return self.exchange(request)
        except ModelMismatch:
            # The trunk can name them if it knows the client's.
            return self.exchange(replace(request, **settings))

    def forward(self, request: m.ForwardRequest) -> m.ForwardReply:
        """Send a training forward, in turn; return the decoded reply."""
        try:
            reply = self.exchange(request, in_turn=True)
        except HistoryLost:
            reply = self.exchange(self._encoder.with_references(request))
        return self._encoder.decode(request, reply) if request.bases_B is not None else reply

    def backward(
        self, backward: m.BackwardRequest, forward: m.ForwardRequest, version: int
    ) -> m.BackwardReply:
        """Send a backward, in turn; if its graph has expired, repeat the forward first.

        Args:
            backward: The request.
            forward: The request of its forward, as it was sent.
            version: The parameter version of the trunk that answered the forward.

        Raises:
            StaleVersion: The graph expired, and the trunk has moved on.
        """
        for tries in range(_REFORWARDS):
            try:
                return self.exchange(backward, in_turn=not tries)
            except ActivationExpired:
                if tries:  # the graph expires for lack of memory, so leave time to other clients
                    self._retry.pause(tries)
                self.forward_again(forward, version)
        return self.exchange(backward)

    def forward_again(self, request: m.ForwardRequest, version: int) -> None:
        """Repeat a forward whose graph is gone, at once.

        Raises:
            StaleVersion: The trunk has another parameter version by now.
        """
        try:
            now = self.exchange(request).version
        except HistoryLost:
            now = self.exchange(self._encoder.with_references(request)).version
        # A gradient through other parameters would not belong to this forward's loss.
        if now != version:
            raise StaleVersion(
                f"the graph of call {request.call} is gone, and the trunk has moved from version "
                f"{version} to {now} meanwhile; repeat the step"
            ) from None


class Retry:
    """Repeats an attempt that failed with a retryable error, or once with `Internal`.

    Args:
        budget_s: The longest time from the first attempt to the last, in seconds.
        rng: The source of the waits' jitter.
        sleep: Waits for a number of seconds.
        clock: Returns monotonic seconds.
    """

    def __init__(
        self,
        budget_s: float,
        rng: random.Random,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget_s = budget_s
        self._rng = rng
        self._sleep = sleep
        self._clock = clock

    def __call__(self, attempt: Callable[[], T], *, first: Callable[[], T] | None = None) -> T:
        """Call `attempt` until it succeeds, fails for good, or the budget is used up.

        Args:
            attempt: Makes one attempt.
            first: Makes the first attempt, if it differs from the others.

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
                # Ever more rarely, since a long outage has many attempts. Quoted: a peer wrote it.
                if tries & (tries + 1) == 0:
                    text = str(failure)
                    log.warning(
                        "%s: %r; trying again in %.1f s",
                        failure.code,
                        text,
                        wait,
                        extra={"error.code": failure.code},
                    )
            self._sleep(wait)
            tries += 1

    def pause(self, tries: int) -> None:
        """Wait as long as after `tries` failed attempts."""
        self._sleep(self._wait_s(tries))

    def _wait_s(self, tries: int) -> float:
        return self._rng.uniform(0.0, min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**tries))
