"""A link that reports what a client waits for: attempts, and the tokens that it generates."""

import time
from collections.abc import Callable

from fedsplit.errors import FedsplitError, SessionLost
from fedsplit.link import Link, Stream
from fedsplit.telemetry.events import RequestRetried, TokenArrived
from fedsplit.telemetry.sinks import Telemetry
from fedsplit.telemetry.spans import span
from fedsplit.wire.messages import CloseRequest, GenerateRequest, R, Request


class MeteredLink(Link):
    """Carries requests over another link, and reports them.

    Args:
        link: The other link, which it closes.
        telemetry: Receives the events.
        clock: Seconds that do not run backwards.
    """

    def __init__(
        self, link: Link, telemetry: Telemetry, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._link = link
        self.telemetry = telemetry
        self._clock = clock
        # By session: the last call, and the time of its reply, or of the first attempt at a prompt.
        self._last: dict[str, tuple[int, float]] = {}

    def exchange(self, request: Request[R]) -> R:
        """See `Link`."""
        with span(self.telemetry, "attempt"):
            return self.reported(request, lambda: self._link.exchange(request))

    def stream(self) -> Stream:
        """See `Link`."""
        return _MeteredStream(self, self._link.stream())

    def close(self) -> None:
        """Close the other link."""
        self._link.close()

    def reported(self, request: Request[R], reply: Callable[[], R]) -> R:
        """Return what `reply` returns, and report it.

        Raises:
            FedsplitError: That of `reply`.
        """
        if isinstance(request, GenerateRequest):
            self._begin(request)
        try:
            found = reply()
        except FedsplitError as failure:
            if failure.retryable:
                self.telemetry.emit(RequestRetried(code=failure.code))
            if isinstance(failure, SessionLost):
                self._last.pop(getattr(request, "session", ""), None)
            raise
        if isinstance(request, GenerateRequest):
            self._end(request)
        elif isinstance(request, CloseRequest):
            self._last.pop(request.session, None)
        return found

    def _begin(self, request: GenerateRequest) -> None:
        call, _ = self._last.get(request.session, (-1, 0.0))
        # Not at a further attempt, so that the wait for it counts.
        if _is_prompt(request) and call != request.call:
            self._last[request.session] = request.call, self._clock()

    def _end(self, request: GenerateRequest) -> None:
        now, one = self._clock(), request.smashed_BTD.shape[1] == 1
        _, since = self._last.get(request.session, (-1, now))
        self._last[request.session] = request.call, now
        # Several tokens after others are drafts, or the next prompt, for which a person took time.
        is_first = _is_prompt(request)
        if one or is_first:
            self.telemetry.emit(TokenArrived(seconds=now - since, is_first=is_first))


def _is_prompt(request: GenerateRequest) -> bool:
    """Whether a request begins a session, with all of its tokens or with a copy of the first."""
    return not request.past or bool(request.source)


class _MeteredStream(Stream):
    def __init__(self, link: MeteredLink, stream: Stream) -> None:
        self._link = link
        self._stream = stream

    def begin(self, request: Request[R]) -> Callable[[], R]:
        attempt = span(self._link.telemetry, "attempt")
        try:
            with attempt.active():
                reply = self._stream.begin(request)
        except BaseException as failure:
            attempt.end(failure)
            raise

        def reported() -> R:
            with attempt:
                return self._link.reported(request, reply)

        return reported
