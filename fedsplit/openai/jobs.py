"""The requests in progress: each is generated in a thread, and its pieces reach the event loop."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

from fedsplit.errors import FedsplitError
from fedsplit.openai.choices import Piece
from fedsplit.openai.generation import Writer
from fedsplit.openai.lanes import Cancelled, Lane, Lanes
from fedsplit.openai.refusals import Refusal
from fedsplit.openai.requests import Sampling
from fedsplit.telemetry.events import RequestAnswered
from fedsplit.telemetry.sinks import Telemetry


class Job:
    """A request in progress; only the event loop uses it.

    Args:
        lane: The lane that it generates over.
        turn: Its number at the lane.
        done: The end of its thread.
        pieces: Gets its pieces, and None after the last one.
    """

    def __init__(
        self,
        lane: Lane,
        turn: int,
        done: "asyncio.Future[None]",
        pieces: "asyncio.Queue[Piece | None]",
    ) -> None:
        self._lane = lane
        self._turn = turn
        self._done = done
        self._pieces = pieces

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield the pieces as they are generated.

        Raises:
            Refusal: The request cannot be served, or was cancelled.
            FedsplitError: The trunk refused, or could not be reached.
        """
        while piece := await self._pieces.get():
            yield piece
        try:
            await self._done
        except Cancelled as exc:
            raise Refusal(
                503, "the request was cancelled; send it again", code="cancelled"
            ) from exc

    def cancel(self) -> None:
        """End it, unless it has ended; does not wait."""
        if not self._done.done():
            # In another thread, since it calls the trunk.
            self._done.get_loop().run_in_executor(None, self._lane.cancel, self._turn)


class Jobs:
    """Begins jobs, as many at a time as there are lanes.

    Args:
        writer: Generates texts.
        lanes: The lanes to the trunk.
        telemetry: Receives an event for each request.
    """

    def __init__(self, writer: Writer, lanes: Lanes, telemetry: Telemetry) -> None:
        self._writer = writer
        self._lanes = lanes
        self._telemetry = telemetry
        self._threads = ThreadPoolExecutor(lanes.number, thread_name_prefix="fedsplit-answer")

    def begin(self, request: Sampling) -> Job:
        """Begin to generate; for the event loop.

        Raises:
            Refusal: All lanes are in use.
        """
        lane, loop, began = self._lanes.take(), asyncio.get_running_loop(), time.monotonic()
        turn = lane.turn
        pieces: asyncio.Queue[Piece | None] = asyncio.Queue()

        def emit(piece: Piece) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def end(done: "asyncio.Future[None]") -> None:
            self._lanes.give(lane)
            pieces.put_nowait(None)
            self.report(request.kind, done.exception(), time.monotonic() - began)

        done = loop.run_in_executor(self._threads, self._write, request, lane, emit)
        done.add_done_callback(end)
        return Job(lane, turn, done, pieces)

    def report(self, kind: str, failure: BaseException | None, seconds: float) -> None:
        """Report a request that has ended, to metrics."""
        code = "OK"
        if isinstance(failure, FedsplitError | Refusal | Cancelled):
            code = getattr(failure, "code", "cancelled").upper()
        elif failure:
            code = "INTERNAL"
        self._telemetry.emit(RequestAnswered(kind=kind, code=code, seconds=seconds))

    def cancel(self) -> None:
        """End all jobs, and begin none any more; for any thread."""
        self._lanes.cancel()

    def close(self) -> None:
        """End all jobs and their threads."""
        self.cancel()
        self._threads.shutdown()
        self._lanes.close()

    def _write(self, request: Sampling, lane: Lane, emit: Callable[[Piece], None]) -> None:
        with self._lanes.using(lane):
            self._writer.write(request, lane, emit)
