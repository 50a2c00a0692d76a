"""Telemetry: passes events to sinks; an event that no sink takes is not made."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress

from fedsplit.errors import FedsplitError
from fedsplit.telemetry.events import Event, TrunkState

log = logging.getLogger(__name__)


class Sink(ABC):
    """Receives events; a subclass writes them somewhere.

    Several threads may call it, and some of them compute, so it must not block for long.

    `needs_details` is false for a sink that ignores all events but those of a run and its rounds,
    and `takes_traces` is true for one that may want traces.
    """

    needs_details: bool = True
    takes_traces: bool = False

    @abstractmethod
    def on_event(self, event: Event) -> None:
        """Receive an event; a sink ignores the classes that it does not know."""

    def wants_trace(self, trace_id: bytes) -> bool:
        """Return whether it takes the spans of the trace of this id; a trace nobody wants has none.

        Only the id decides, so that all processes choose the same traces.
        """
        return False

    # Only some sinks read states, or have something left at the end.
    def watch(self, name: str, state: Callable[[], TrunkState]) -> None:  # noqa: B027
        """Note that `state` returns the state of the trunk `name`; any thread may call it."""

    def close(self) -> None:  # noqa: B027
        """Write what is left; no event follows."""


class Telemetry:
    """The sinks of a process, a run or a client.

    It is false without a sink that needs details, so that no event is made for nobody. The events
    of a run and its rounds are made in any case.

    Args:
        sinks: The sinks.
    """

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = list(sinks)

    def __bool__(self) -> bool:
        # Without a generator, since several lines of every request ask.
        for sink in self._sinks:  # noqa: SIM110
            if sink.needs_details:
                return True
        return False

    def add(self, sink: Sink) -> None:
        """Add a sink."""
        self._sinks.append(sink)

    @property
    def takes_traces(self) -> bool:
        """Whether a sink may want traces."""
        return any(sink.takes_traces for sink in self._sinks)

    def wants_trace(self, trace_id: bytes) -> bool:
        """Return whether a sink wants the trace of this id."""
        return any(sink.wants_trace(trace_id) for sink in self._sinks)

    def emit(self, event: Event) -> None:
        """Pass an event to all sinks. A sink that fails is removed, and the failure is logged.

        Raises:
            FedsplitError: A sink of fedsplit could not write what a run must not lose.
        """
        for sink in tuple(self._sinks):
            try:
                sink.on_event(event)
            except FedsplitError:
                raise
            # Training must not end because somebody's dashboard is away.
            except Exception:
                log.exception("%s failed and receives no more events", type(sink).__name__)
                with suppress(ValueError):  # it failed in another thread as well
                    self._sinks.remove(sink)

    def watch(self, name: str, state: Callable[[], TrunkState]) -> None:
        """Let sinks read the state of the trunk `name`; any thread may call `state`."""
        for sink in self._sinks:
            sink.watch(name, state)

    def close(self) -> None:
        """Close and remove all sinks."""
        while self._sinks:
            self._sinks.pop().close()


SILENT = Telemetry()
"""Telemetry without a sink, for objects that report to nobody; nothing is added to it."""
