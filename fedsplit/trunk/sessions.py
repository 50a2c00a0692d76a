"""What the service keeps for one session: where it stands, and what became of its requests."""

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

_EVENTS = {
    Kind.FORWARD: Event.FORWARD,
    Kind.BACKWARD: Event.BACKWARD,
    Kind.STEP: Event.STEP,
    Kind.GENERATE: Event.GENERATE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionInfo:
    """What a session is for: a client, in a round, to train, to evaluate or to generate."""

    client: str
    name: str
    round: int
    training: bool
    generating: bool = False

    def is_like(self, other: "SessionInfo") -> bool:
        """Whether both are for the same client and purpose; a client may generate in several."""
        if self.generating or other.generating:
            return False
        return (self.client, self.training) == (other.client, other.training)


@dataclass(slots=True, kw_only=True, eq=False)
class Session:
    """A session of a client; `lock` is held while a request is looked at.

    It is dropped at `expires_at` unless its client says something before; `leaving` is then the
    future of its end. A client has at most `at_once` calls on their way, and may ask for each of
    them again; their replies hold tensors, so no more are kept than these and as many to spare.
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
        """The future of a request; only the first request of its name becomes a call.

        Raises:
            ProtocolError: The request is not legal now.
            SessionLost: The session has ended.
        """
        name = type(request), request.call
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
            (self.info.name, call): future
            for (kind, call), future in self.replies.items()
            if kind is StepRequest
        }


def no_session(name: str) -> SessionLost:
    """The error for a session that is not, or no longer, there."""
    return SessionLost(f"no session {name} here (any more); open a new one")
