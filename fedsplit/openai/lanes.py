"""The lanes to the trunk: each serves one request at a time, and can be cancelled meanwhile.

The requests of one link follow one another. So each lane has a link, and the trunk gets the tokens
of all requests together, which it runs in one pass. A session does not belong to a lane: the next
request of a conversation may take another one.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fedsplit.errors import FedsplitError
from fedsplit.link import Link
from fedsplit.model import connect
from fedsplit.openai.refusals import Refusal, refusal_of
from fedsplit.serve.client import Reached, Route
from fedsplit.wire.messages import (
    CloseRequest,
    GenerateReply,
    GenerateRequest,
    OpenReply,
    R,
    Request,
)


class Cancelled(Exception):  # noqa: N818  # it ends a generation that nobody waits for
    """The client of a request is gone."""


class Lane(Link):
    """A link for one generation at a time.

    Once the trunk has opened a session or has answered for one, a failure is repeated within the
    run's budget, so that the text goes on after an outage. Before that, the caller gets the failure
    at once.

    Args:
        route: The way to the trunk.

    Attributes:
        turn: The number of the generation, which names it to `cancel`.
    """

    def __init__(self, route: Route) -> None:
        self.turn = 0
        self._link = route.link()
        self._lock = threading.Lock()
        self._cancelled = self._has_begun = False
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
        if isinstance(request, GenerateRequest):
            self._continue(request.session)
        elif self._cancelled:
            raise Cancelled
        try:
            reply = self._link.exchange(request)
        except FedsplitError as exc:
            if exc.retryable and not self._has_begun:
                raise refusal_of(exc) from exc
            raise
        self._has_begun |= isinstance(reply, OpenReply | GenerateReply)
        if isinstance(reply, OpenReply):
            try:
                self._continue(reply.session)
            except Cancelled:
                self._close_session(reply.session)
                raise
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
        """Forget the generation, which has ended, and be ready for the next one."""
        with self._lock:
            self.turn += 1
            self._cancelled = self._has_begun = False
            self._session = ""

    def _continue(self, session: str) -> None:
        """Note the session of the generation, unless it must end."""
        with self._lock:
            if self._cancelled:
                raise Cancelled
            self._session = session

    def _close_session(self, session: str) -> None:
        with suppress(FedsplitError):  # the trunk ends the sessions of a lost connection itself
            self._link.exchange(CloseRequest(session=session))


class Lanes(Link):
    """All lanes to a trunk; the event loop takes them and gives them back.

    As a link it is the lane of the calling thread. While it is open, the model generates over it.

    Args:
        reached: The model and the way to its trunk.
        number: How many lanes there are.
    """

    def __init__(self, reached: Reached, number: int) -> None:
        self._route = reached.route
        self.number = number
        self._free: list[Lane] = []
        self._all: list[Lane] = []
        self._closing = False
        self._thread = _Thread()
        # One handle for all sessions, since they outlive the requests.
        self._trunk = reached.route.trunk(self, reached.model)
        connect(reached.model, self._trunk)

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
            self._free.append(Lane(self._route))
            self._all.append(self._free[0])
        return self._free.pop()

    def give(self, lane: Lane) -> None:
        """Give back a lane whose generation has ended."""
        self._free.append(lane)

    @contextmanager
    def using(self, lane: Lane) -> Iterator[None]:
        """A context in which this thread generates over the lane; closes dropped sessions."""
        self._thread.lane = lane
        try:
            yield
        finally:
            lane.end()
            # The trunk ends the sessions of a lost connection itself.
            with suppress(FedsplitError, Refusal):
                self._trunk.end_generations()
            self._thread.lane = None

    def exchange(self, request: Request[R]) -> R:
        """See `Link`; over the lane of this thread."""
        lane = self._thread.lane
        assert lane is not None, "the model generates inside of `using`"
        return lane.exchange(request)

    def cancel(self) -> None:
        """End all generations, and lend no lane any more; for any thread."""
        self._closing = True
        for lane in tuple(self._all):
            if lane not in self._free:
                lane.cancel(lane.turn)

    def close(self) -> None:
        """Close all sessions, and the connections of all lanes."""
        for lane in self._all[:1]:
            with self.using(lane), suppress(Refusal):
                self._trunk.disconnect()
        for lane in self._all:
            lane.close()


class _Thread(threading.local):
    lane: Lane | None = None
