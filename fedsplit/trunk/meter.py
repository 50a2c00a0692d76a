"""The meter of an engine: makes events of its calls and steps, and knows how regular steps are."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

from fedsplit.errors import GradExploded, NonFinite, ProtocolError, StaleVersion
from fedsplit.telemetry.events import Contributed, PassRun, StepTaken
from fedsplit.telemetry.sinks import SILENT, Telemetry
from fedsplit.trunk.call import Call, Kind

_INTERVALS = 32
"""The intervals between steps of which the usual one is the median."""

_OF_TRAINING = (Kind.FORWARD, Kind.BACKWARD, Kind.STEP)


class Meter:
    """Makes the events of one engine; the engine's thread alone calls it, except as noted.

    Without a sink, it does nothing.

    Args:
        clock: Seconds that do not run backwards.

    Attributes:
        telemetry: Where events go; set it before the engine starts.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.telemetry: Telemetry = SILENT
        self._clock = clock
        self._contributed: dict[str, float] = {}
        self._released: dict[str, float] = {}
        self._since = clock()
        self._intervals: deque[float] = deque(maxlen=_INTERVALS)

    # --- events -------------------------------------------------------------------------------

    def passed(
        self, kind: Kind, begun: Sequence[Call], size: tuple[int, int], began: float, ended: float
    ) -> None:
        """Report a pass; call it only if there is a sink.

        Args:
            kind: The kind of its calls.
            begun: Those of its calls that had not run in part before.
            size: The sessions in it, and the sequences times tokens that ran.
            began: The time when it began.
            ended: The time when it ended.
        """
        # A forward waits for its client's step; only after that it waits for the engine.
        ready = [max(call.submitted_at, self._released.get(call.client, 0.0)) for call in begun]
        compute_s, ago_s = ended - began, self._clock() - ended
        for call, ready_at in zip(begun, ready, strict=True):
            queue_s = max(0.0, began - ready_at)
            if ready_at > call.submitted_at:
                waited_s = ready_at - call.submitted_at
                call.span.record("barrier", seconds=waited_s, ago_s=ago_s + compute_s + queue_s)
            call.span.record("queue", seconds=queue_s, ago_s=ago_s + compute_s)
            call.span.record("compute", seconds=compute_s, ago_s=ago_s)
        self.telemetry.emit(
            PassRun(
                kind=kind.value[1],
                sessions=size[0],
                tokens=size[1],
                queues_s=tuple(max(0.0, began - each) for each in ready),
                compute_s=compute_s,
            )
        )

    def contributed(self, client: str, staleness: int) -> None:
        """Report a contribution that was accepted."""
        if self.telemetry:
            self._contributed[client] = self._clock()
            outcome = "late" if staleness else "used"
            self.telemetry.emit(Contributed(client=client, outcome=outcome, staleness=staleness))

    def failed(self, call: Call, failure: Exception) -> None:
        """Report a contribution that was refused."""
        if not self.telemetry or call.kind not in _OF_TRAINING:
            return
        if isinstance(failure, StaleVersion):
            self.telemetry.emit(Contributed(client=call.client, outcome="stale"))
        elif isinstance(failure, NonFinite | GradExploded | ProtocolError):
            self.telemetry.emit(Contributed(client=call.client, outcome="refused"))

    def stepped(self, step: StepTaken) -> None:
        """Report a step."""
        if not self.telemetry:
            return
        now = self._clock()
        self._intervals.append(now - self._since)
        self._since = now
        waits = tuple(now - self._contributed.pop(client, now) for client in step.clients)
        self._released |= dict.fromkeys(step.clients, now)
        self.telemetry.emit(replace(step, waits_s=waits))

    def began(self) -> None:
        """Note that clients train from now on, where none did."""
        self._since = self._clock()

    def forget(self, client: str) -> None:
        """Forget a client that has left."""
        self._released.pop(client, None)
        self._contributed.pop(client, None)

    # --- called from any thread ---------------------------------------------------------------

    @property
    def idle_s(self) -> float:
        """Seconds since the last step, or since clients began to train."""
        return self._clock() - self._since

    @property
    def interval_s(self) -> float:
        """The median of the last intervals between steps, in seconds; 0 if there is none."""
        return median(tuple(self._intervals) or (0.0,))
