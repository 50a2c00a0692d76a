"""The events of a schedule: what each side did, with the identity of the work and its digest."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fedsplit.wire import messages as m
from simulations.schedules.trunk import Array, Values

TRUNK = "trunk"
KINDS: dict[type, str] = {
    m.OpenRequest: "open",
    m.ForwardRequest: "forward",
    m.BackwardRequest: "backward",
    m.StepRequest: "step",
    m.CloseRequest: "close",
    m.GenerateRequest: "generate",
    m.GradientsRequest: "gradients",
    m.TrainingStateRequest: "state",
}
"""The kind of each message, by the type of its request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One event of one side.

    `side` is a client's name or the trunk, and `what` the event. `kind`, `client`, `session` and
    `call` name the work, `incarnation` and `version` the trunk's state, and `digest` the values
    that were sent or applied. `data` has what the checker's model computes with.
    """

    number: int
    time: float
    side: str
    what: str
    client: str = ""
    kind: str = ""
    session: str = ""
    call: int = -1
    incarnation: str = ""
    version: int = -1
    digest: str = ""
    note: str = ""
    data: Any = None

    def __str__(self) -> str:
        shown = (
            ("of", self.client if self.client != self.side else ""),
            ("session", self.session[:4]),
            ("call", self.call if self.call >= 0 else ""),
            ("version", self.version if self.version >= 0 else ""),
            ("incarnation", self.incarnation[:4]),
            ("sha256", self.digest),
        )
        told = [f"{self.side}: {self.what} {self.kind}".strip()]
        told += [f"{name} {value}" for name, value in shown if value != ""]
        told += [self.note] if self.note else []
        return f"#{self.number} at {self.time:.2f} s, {', '.join(told)}"


class Log:
    """The events of one schedule, in order.

    Args:
        clock: The virtual time of the schedule.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.events: list[Event] = []
        self._clock = clock

    def add(self, side: str, what: str, **fields: Any) -> Event:
        """Append an event."""
        event = Event(number=len(self.events), time=self._clock(), side=side, what=what, **fields)
        self.events.append(event)
        return event

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)


def digest_of(values: Values | Array) -> str:
    """Return the first digits of the sha256 of values."""
    arrays = [values[name] for name in sorted(values)] if isinstance(values, dict) else [values]
    # A sum may be -0.0 where another one is 0.0.
    return hashlib.sha256(b"".join((each + 0.0).tobytes() for each in arrays)).hexdigest()[:12]
