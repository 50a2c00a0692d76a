"""Gets a client's requests answered: again if need be, and with whatever the trunk has lost."""

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from fedsplit.client.history import History
from fedsplit.client.overlap import Overlap
from fedsplit.client.retry import Retry
from fedsplit.errors import ActivationExpired, HistoryLost, StaleVersion
from fedsplit.link import Link
from fedsplit.randomness import rng_released
from fedsplit.spec import RunSpec
from fedsplit.wire import messages as m

T = TypeVar("T")

_REFORWARDS = 6
"""How often a graph that expired is made again before its backward is given up."""


class Carrier:
    """Carries one client's requests to its trunk.

    Args:
        link: Leads to the trunk.
        run: How long to try, and how many pieces of a step are under way at a time.
        client: The client's name.
        history: What forwards go by.
    """

    def __init__(self, link: Link, run: RunSpec, *, client: str, history: History) -> None:
        self._link = link
        self._history = history
        self._overlap = Overlap(link, run.train.micro_batches)
        self._retry = Retry(run.wire.budget_s, random.Random(client))

    def overlapped(self, pieces: Sequence[Callable[[], T]]) -> list[T]:
        """Do pieces of a step, `train.micro_batches` of them at a time; what each returned."""
        return self._overlap.run(pieces)

    def exchange(self, request: m.Request[m.R]) -> m.R:
        """Send a request, again if need be, and wait for its reply.

        Raises:
            FedsplitError: The last failure.
        """
        with rng_released():
            return self._retry(lambda: self._link.exchange(request))

    def in_turn(self, request: m.Request[m.R]) -> m.R:
        """As `exchange`; other pieces of a step that is `overlapped` go on meanwhile."""
        with rng_released():
            return self._overlap.exchange(request, self._retry)

    def forward(self, request: m.ForwardRequest) -> m.ForwardReply:
        """Carry a training forward there, and its reply back, whole; in turn."""
        return self._history.received(request, self._with_bases(request, self.in_turn))

    def backward(
        self, backward: m.BackwardRequest, forward: m.ForwardRequest, version: int
    ) -> m.BackwardReply:
        """Carry a backward there and back, in turn; an expired graph is made again before.

        Args:
            backward: The request.
            forward: That of the forward before, with what it went by.
            version: The trunk's version that answered it.

        Raises:
            StaleVersion: The graph expired, and the trunk has moved on.
        """
        for tries in range(_REFORWARDS):
            try:
                return self.exchange(backward) if tries else self.in_turn(backward)
            except ActivationExpired:
                if tries:  # others need the trunk's memory as well; make room for one another
                    self._retry.pause(tries)
                self._forward_again(forward, version)
        return self.exchange(backward)

    def _forward_again(self, request: m.ForwardRequest, version: int) -> None:
        """Have the trunk make an expired graph again; its dropout is that of the call."""
        now = self._with_bases(request, self.exchange).version
        if now != version:
            raise StaleVersion(
                f"the graph of call {request.call} expired, and the trunk has moved from version "
                f"{version} to {now} meanwhile; repeat the step"
            )

    def _with_bases(
        self, request: m.ForwardRequest, send: Callable[[m.ForwardRequest], m.ForwardReply]
    ) -> m.ForwardReply:
        """Send a forward, and once more with what it goes by if the trunk has lost that."""
        try:
            return send(request)
        except HistoryLost:
            return self.exchange(self._history.complete(request))
