"""The lanes to the trunk: each serves one request at a time, and can be cancelled meanwhile.

The requests of one link follow one another. So each lane has a link, and the trunk gets the tokens
of all requests together, which it runs in one pass.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fedsplit.client.kv_session import TrunkCache
from fedsplit.errors import FedsplitError
from fedsplit.link import Link
from fedsplit.model import connect
from fedsplit.openai.refusals import Refusal, refusal_of
from fedsplit.serve.client import Reached
from fedsplit.wire.messages import CloseRequest, OpenReply, R, Request


class Cancelled(Exception):  # noqa: N818  # it ends a generation that nobody waits for
    """The client of a request is gone."""


class Lane(Link):
    """A link for one generation at a time.

    Once the trunk has opened a session, a failure is repeated within the run's budget, so that the
    text goes on after an outage. Before that, the caller gets the failure at once.

    Args:
        reached: The model and the way to its trunk.

    Attributes:
        trunk: The handle of the trunk for the generation's session.
        turn: The number of the generation, which names it to `cancel`.
    """

    def __init__(self, reached: Reached) -> None:
        self.turn = 0
        self._link = reached.route.link()
        self.trunk = reached.route.trunk(self, reached.model)
        self._lock = threading.Lock()
        self._cancelled = False
        self._session = ""

    @property
    def cancelled(self) -> bool:
        """Whether the generation must end."""
        return self._cancelled

    def exchange(self, request: Request[R]) -> R:
        """See `Link`.

        Raises:
            Cancelled: The generation must end.
            Refusal: The trunk cannot open a session now.
        """
        if self._cancelled:
            raise Cancelled
        try:
            reply = self._link.exchange(request)
        except FedsplitError as exc:
            if exc.retryable and not self._session:
                raise refusal_of(exc) from exc
            raise
        if isinstance(reply, OpenReply):
            with self._lock:
                self._session = reply.session
                is_late = self._cancelled
            if is_late:
                self._close_session(reply.session)
                raise Cancelled
        return reply

    def close(self) -> None:
        """Close the connection."""
        self._link.close()

    def cancel(self, turn: int) -> None:
        """End a generation, also while it waits for the trunk; for any thread.

        Its session is closed, whose request then fails, and no other one is sent.

        Args:
            turn: The number of the generation; nothing is done if it has ended already.
        """
        with self._lock:
            if turn != self.turn:
                return
            self._cancelled = True
            session = self._session
        if session:
            self._close_session(session)

    def end(self) -> None:
        """Close the session of a generation that has ended, and be ready for the next one."""
        with self._lock:
            self.turn += 1
            self._cancelled = False
        self.trunk.disconnect()
        self._session = ""

    def _close_session(self, session: str) -> None:
        with suppress(FedsplitError):  # the trunk ends the sessions of a lost connection itself
            self._link.exchange(CloseRequest(session=session))


class Lanes:
    """All lanes to a trunk; the event loop takes them and gives them back.

    While it is open, the model's generations use the lane of their thread.

    Args:
        reached: The model and the way to its trunk.
        number: How many lanes there are.
    """

    def __init__(self, reached: Reached, number: int) -> None:
        self._reached = reached
        self.number = number
        self._free: list[Lane] = []
        self._all: list[Lane] = []
        self._closing = False
        self._thread = _Thread()
        # The trunk of `reached` sends what a lane's cache holds, whoever has made the cache.
        connect(reached.model, reached.trunk, self._new_cache)

    def take(self) -> Lane:
        """Return a lane that nobody uses.

        Raises:
            Refusal: All lanes are in use, or the server is shutting down.
        """
        if self._closing:
            raise Refusal(503, "the server is shutting down; try again later", code="draining")
        if not self._free:
            if len(self._all) >= self.number:
                raise Refusal(
                    429,
                    f"this server answers {self.number} requests at a time (--max-requests), and "
                    "as many are running; try again",
                    code="rate_limit_exceeded",
                )
            self._free.append(Lane(self._reached))
            self._all.append(self._free[0])
        return self._free.pop()

    def give(self, lane: Lane) -> None:
        """Give back a lane whose generation has ended."""
        self._free.append(lane)

    @contextmanager
    def using(self, lane: Lane) -> Iterator[None]:
        """A context in which this thread generates over the lane; it ends the lane's session."""
        self._thread.lane = lane
        try:
            yield
        finally:
            self._thread.lane = None
            lane.end()

    def cancel(self) -> None:
        """End all generations, and lend no lane any more; for any thread."""
        self._closing = True
        for lane in tuple(self._all):
            if lane not in self._free:
                lane.cancel(lane.turn)

    def close(self) -> None:
        """Close the connections of all lanes."""
        for lane in self._all:
            lane.close()

    def _new_cache(self, max_length: int | None) -> TrunkCache:
        lane = self._thread.lane
        assert lane is not None, "the model generates inside of `using`"
        return lane.trunk.new_cache(max_length)


class _Thread(threading.local):
    lane: Lane | None = None
