"""The state of one session at the service: its place in the protocol, and its recent replies."""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from fedsplit.errors import SessionLost
from fedsplit.trunk.call import Call, Kind
from fedsplit.wire.messages import StepReply, StepRequest
from fedsplit.wire.session import Event, SessionState, advance

Steps = dict[tuple[str, int], "Future[StepReply]"]
"""The remembered steps of a session, by session and call."""

_EVENTS = {
    Kind.FORWARD: Event.FORWARD,
    Kind.BACKWARD: Event.BACKWARD,
    Kind.STEP: Event.STEP,
    Kind.GENERATE: Event.GENERATE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionInfo:
    """The client, the round and the purpose of a session: to train, to evaluate or to generate."""

    client: str
    name: str
    round: int
    training: bool
    generating: bool = False

    def is_like(self, other: "SessionInfo") -> bool:
        """Return whether both have the same client and purpose, so that one replaces the other."""
        # A client may have several conversations at a time, so generating replaces nothing.
        if self.generating or other.generating:
            return False
        return (self.client, self.training) == (other.client, other.training)


@dataclass(slots=True, kw_only=True, eq=False)
class Session:
    """A session of a client; `lock` is held while a request is checked.

    The session is dropped at `expires_at` unless a request arrives before. `leaving` is then the
    future of its end. A client has at most `at_once` calls outstanding, and may repeat each.
    """

    info: SessionInfo
    at_once: int = 1
    state: SessionState = field(default_factory=SessionState)
    replies: "OrderedDict[tuple[type, int], Future[Any]]" = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    expires_at: float = math.inf
    leaving: "Future[None] | None" = None

    def once(
        self, kind: Kind, request: Any, submit: "Callable[[Call], Future[Any]]"
    ) -> "Future[Any]":
        """Return the future of a request; only the first request of its name becomes a call.

        Raises:
            ProtocolError: The request is not legal now.
            SessionLost: The session has ended.
        """
        name = type(request), request.call
        # Two copies of one request may arrive at a time; the lock lets one of them submit.
        with self.lock:
            if self.leaving:
                raise no_session(self.info.name)
            future = self.replies.get(name)
            if future is None:
                self.state = advance(self.state, _EVENTS[kind], request.call)
                info = self.info
                call = Call(
                    kind=kind,
                    client=info.client,
                    session=info.name,
                    round=info.round,
                    request=request,
                )
                future = self.replies[name] = submit(call)
                # Replies hold tensors: those that may be repeated are kept, and as many to spare.
                while len(self.replies) > 2 * self.at_once:
                    self.replies.popitem(last=False)
        return future

    def forget(self, kind: type, call: int) -> None:
        """Drop a reply whose request will not be repeated."""
        with self.lock:
            self.replies.pop((kind, call), None)

    def take_back(self, kind: type, call: int, future: "Future[Any]") -> None:
        """Undo a backward whose graph was gone, so that the client can repeat the forward."""
        # Several threads may wait for `future`, and only the first may undo it.
        with self.lock:
            if self.replies.get((kind, call)) is future:
                del self.replies[kind, call]
                self.state = advance(self.state, Event.EXPIRED, call)

    def steps(self) -> Steps:
        """Return the futures of the remembered steps."""
        return {
            (self.info.name, call): future
            for (kind, call), future in self.replies.items()
            if kind is StepRequest
        }


def no_session(name: str) -> SessionLost:
    """Return the error for a session that is unknown or has ended."""
    return SessionLost(f"no session {name} here: it is unknown or has ended; open a new one")
