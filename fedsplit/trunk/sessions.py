"""The state of one session at the service: its place in the protocol, and its recent replies."""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from fedsplit.errors import Overloaded, SessionLost
from fedsplit.trunk.call import Call, Kind
from fedsplit.wire.messages import (
    BackwardRequest,
    GenerateReply,
    GenerateRequest,
    StepReply,
    StepRequest,
)
from fedsplit.wire.session import Event, SessionState, advance

Steps = dict[tuple[str, int], "Future[StepReply]"]
"""The remembered steps of a session, by session and call."""

_RETRY_S = 0.1
"""How long a client waits before it repeats a request that came too early."""

_EVENTS = {
    Kind.FORWARD: Event.FORWARD,
    Kind.BACKWARD: Event.BACKWARD,
    Kind.STEP: Event.STEP,
    Kind.GENERATE: Event.GENERATE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptedStep:
    """An accepted step of a client: its session, its call, and the version that it makes."""

    session: str
    call: int
    version: int

    def remembered(self) -> Steps:
        """Return the step with its reply."""
        future: Future[StepReply] = Future()
        future.set_result(StepReply(version=self.version))
        return {(self.session, self.call): future}


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionInfo:
    """The client, the round and the purpose of a session: to train, to evaluate or to generate.

    With `of_follower`, its graphs are at another server of the run, and only its steps here.
    """

    client: str
    name: str
    round: int
    training: bool
    generating: bool = False
    of_follower: bool = False

    def is_like(self, other: "SessionInfo") -> bool:
        """Return whether both have the same client and purpose, so that one replaces the other."""
        # A client may have several conversations at a time, so generating replaces nothing.
        if self.generating or other.generating:
            return False
        return (self.client, self.training) == (other.client, other.training)


@dataclass(slots=True, kw_only=True, eq=False)
class Session:
    """A session of a client; `lock` is held while a request is checked.

    The session is dropped at `expires_at` unless a request arrives before; it `is_carried` by a
    connection once a request of it was answered on that. `leaving` is then the
    future of its end, and `used_at` is the time of the last request, in seconds. A client has at
    most `at_once` calls outstanding, and may repeat each. `in_progress` are the calls that the
    engine has not answered, and `too_large` the last call whose reply was too large to keep.
    """

    info: SessionInfo
    at_once: int = 1
    state: SessionState = field(default_factory=SessionState)
    replies: "OrderedDict[tuple[type, int], Future[Any]]" = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    expires_at: float = math.inf
    is_carried: bool = False
    used_at: float = 0.0
    leaving: "Future[None] | None" = None
    in_progress: "set[Future[Any]]" = field(default_factory=set)
    too_large: int = -1

    def once(
        self,
        kind: Kind,
        request: Any,
        submit: "Callable[[Call], Future[Any]]",
        *,
        event: Event | None = None,
    ) -> "Future[Any]":
        """Return the future of a request; only the first request of its name becomes a call.

        An evaluation changes no state, so each copy of it is a call.

        Args:
            kind: The kind of the call.
            request: The request.
            submit: Takes the call, and returns its future without waiting.
            event: The event in the session, if it is not that of the kind.

        Raises:
            ProtocolError: The request is not legal now.
            Overloaded: Too many other requests of this session have no answer yet.
            SessionLost: The session has ended, or the reply was too large to be kept.
        """
        name, event = (type(request), request.call), event or _EVENTS.get(kind)
        # Two copies of one request may arrive at a time; the lock lets one of them submit.
        with self.lock:
            future = self.replies.get(name) if event else None
            if future is None or self.leaving:
                self._require_room()
                if kind is Kind.GENERATE and request.call == self.too_large:
                    raise SessionLost(
                        f"the reply to call {request.call} is larger than limits.reply_bytes and "
                        "was not kept; send the session's tokens again"
                    )
                if event:
                    self.state = advance(self.state, event, request.call)
                info = self.info
                call = Call(
                    kind=kind,
                    client=info.client,
                    session=info.name,
                    round=info.round,
                    request=request,
                )
                future = submit(call)
                self.in_progress.add(future)
                # Removed at once, because a reply holds tensors.
                future.add_done_callback(self.in_progress.discard)
                if event:
                    if kind is Kind.STEP:
                        self._forget_backwards(request.call)
                    self.replies[name] = future
                    self._drop_replies()
        return future

    def _forget_backwards(self, call: int) -> None:
        # The client has these replies, or it could not step. Until its next step, which may be long
        # after, they would hold a tensor each.
        for name in [name for name in self.replies if name[0] is BackwardRequest]:
            if name[1] <= call:
                del self.replies[name]

    def _require_room(self) -> None:
        if self.leaving:
            raise no_session(self.info.name)
        # A future is done before the callback that removes it has run.
        unanswered = sum(not each.done() for each in tuple(self.in_progress))
        # The tokens of a request follow those of the one before, so one at a time is generated. A
        # client that trains may have given up requests that still wait at the barrier.
        most = 1 if self.info.generating else 2 * self.at_once
        if unanswered >= most:
            raise Overloaded(
                f"{unanswered} requests of this session have no answer yet, which is "
                "the most; wait for their replies",
                retry_after_s=_RETRY_S,
            )

    def _drop_replies(self) -> None:
        # Replies hold tensors: those that may be repeated are kept, and as many to spare. A client
        # that generates has read the reply before it sends the next tokens.
        most = 1 if self.info.generating else 2 * self.at_once
        for name in [name for name, each in self.replies.items() if each.done()]:
            if len(self.replies) > most:
                del self.replies[name]

    def reply_to(self, request: Any) -> "Future[Any]":
        """Answer a client that has left the follower of this session.

        Raises:
            SessionLost: The request is no step that was accepted from the follower before.
        """
        name = type(request), getattr(request, "call", -1)
        future = self.replies.get(name) if isinstance(request, StepRequest) else None
        if future is None:
            raise no_session(self.info.name)
        return future

    def forget(self, kind: type, call: int) -> None:
        """Drop a reply whose request will not be repeated."""
        with self.lock:
            self.replies.pop((kind, call), None)

    def keep_if_small(self, call: int, reply: GenerateReply, most_bytes: int) -> None:
        """Drop the reply to a call that generates if it has more than `most_bytes` bytes."""
        if _bytes_of(reply) > most_bytes:
            with self.lock:
                self.replies.pop((GenerateRequest, call), None)
                self.too_large = max(self.too_large, call)

    def reply_bytes(self) -> int:
        """Return the bytes of the largest reply of generation that is kept."""
        with self.lock:
            kept = [each for (kind, _), each in self.replies.items() if kind is GenerateRequest]
        answered = [each for each in kept if each.done() and not each.exception()]
        return max((_bytes_of(each.result()) for each in answered), default=0)

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


def _bytes_of(reply: GenerateReply) -> int:
    tensors = [reply.trunk_out_BTD]
    tensors += [each for entry in reply.entries for each in (entry.keys_BHTE, entry.values_BHTE)]
    return sum(each.nbytes for each in tensors)


def no_session(name: str) -> SessionLost:
    """Return the error for a session that is unknown or has ended."""
    return SessionLost(f"no session {name} here: it is unknown or has ended; open a new one")
