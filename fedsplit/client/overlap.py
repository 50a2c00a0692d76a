"""Pieces of a step that overlap: one computes while the trunk is at work for others.

A request is sent while its piece has the turn, so the trunk is asked in one order. What is lost
is sent again at the piece's next turn, while the others wait; so that order stays what it was.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

from fedsplit.client.relay import Relay
from fedsplit.client.retry import Retry
from fedsplit.errors import FedsplitError
from fedsplit.link import Lane, Link
from fedsplit.wire.messages import R, Request

T = TypeVar("T")


class Overlap:
    """Carries the requests of pieces that are under way together.

    Args:
        link: Leads to the trunk.
        at_once: How many pieces are under way at a time.
    """

    _lane: Lane  # of the pieces that are under way now

    def __init__(self, link: Link, at_once: int) -> None:
        self._link = link
        self._relay = Relay(at_once)

    def run(self, pieces: Sequence[Callable[[], T]]) -> list[T]:
        """Do all pieces; what each returned.

        Raises:
            FedsplitError: The first failure; by then none is under way any more.
        """
        self._lane = self._link.lane()
        return self._relay.run(pieces)

    def exchange(self, request: Request[R], retry: Retry) -> R:
        """Send a request, again if need be, and wait for its reply.

        In a piece others have their turns meanwhile.

        Raises:
            FedsplitError: The last failure.
        """
        first = [self._begun(request)] if self._relay.has_me else []
        again = itertools.repeat(lambda: self._link.exchange(request))
        attempts: Iterator[Callable[[], R]] = itertools.chain(first, again)
        return retry(lambda: next(attempts)())

    def _begun(self, request: Request[R]) -> Callable[[], R]:
        """What hands out what became of the first attempt."""
        outcome: Future[R] = Future()
        answer = self._lane.begin(request)
        with self._relay.away():
            try:
                outcome.set_result(answer())
            except FedsplitError as failure:
                outcome.set_exception(failure)
        return outcome.result
