"""What the service keeps for one session: where it stands, and what became of its requests."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fedsplit.errors import SessionLost
from fedsplit.trunk.calls import Worker
from fedsplit.wire.messages import StepReply, StepRequest
from fedsplit.wire.session import Event, SessionState, advance

T = TypeVar("T")

Steps = dict[tuple[str, int], "Future[StepReply]"]


@dataclass(slots=True, kw_only=True, eq=False)
class Session:
    """A session of a client; `lock` is held while a request is looked at.

    `farewell` ends it unless its client says something, and `leaving` is what becomes of the end.
    A client has at most `at_once` calls on their way, and may ask for each of them again; their
    replies hold tensors, so no more are kept than these and as many to spare.
    """

    worker: Worker
    at_once: int = 1
    state: SessionState = field(default_factory=SessionState)
    replies: "OrderedDict[tuple[type, int], Future[Any]]" = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    farewell: threading.Timer | None = None
    leaving: "Future[None] | None" = None

    def once(
        self, request: Any, event: Event, submit: Callable[[Worker, Any], "Future[T]"]
    ) -> "Future[T]":
        """What became, or becomes, of a request; only the first one of its name is worked on.

        Raises:
            ProtocolError: The request is not legal now.
            SessionLost: The session has ended.
        """
        name = type(request), request.call
        with self.lock:
            if self.leaving:
                raise no_session(self.worker.session)
            future = self.replies.get(name)
            if future is None:
                self.state = advance(self.state, event, request.call)
                future = self.replies[name] = submit(self.worker, request)
                while len(self.replies) > 2 * self.at_once:
                    self.replies.popitem(last=False)
        return future

    def forget(self, kind: type, call: int) -> None:
        """Free a reply that will not be asked for again."""
        with self.lock:
            self.replies.pop((kind, call), None)

    def take_back(self, kind: type, call: int, future: "Future[Any]") -> None:
        """Have a backward that found no graph count as not done."""
        with self.lock:  # several may wait for it, and only the first takes it back
            if self.replies.get((kind, call)) is future:
                del self.replies[kind, call]
                self.state = advance(self.state, Event.EXPIRED, call)

    def steps(self) -> Steps:
        """What became of the steps that are remembered."""
        return {
            (self.worker.session, call): future
            for (kind, call), future in self.replies.items()
            if kind is StepRequest
        }

    def is_of(self, worker: Worker) -> bool:
        """Whether it is of the same client and for the same purpose."""
        mine = self.worker
        if mine.generating or worker.generating:  # a client may have several of these
            return False
        return (mine.client, mine.training) == (worker.client, worker.training)

    def cancel_farewell(self) -> None:
        """The client has said something, or will never again."""
        if self.farewell:
            self.farewell.cancel()
            self.farewell = None


def no_session(name: str) -> SessionLost:
    """The error for a session that is not, or no longer, there."""
    return SessionLost(f"no session {name} here (any more); open a new one")
