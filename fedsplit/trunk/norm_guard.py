"""The norm guard: compares contributions with those before them, and counts what it refuses.

It is pure: it has no torch and no threads, and gets the time as an argument. A trunk uses it for
the gradients of clients, and a server for their changes of the client weights.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import median_low

from fedsplit.errors import GradExploded, Quarantined
from fedsplit.spec import GuardSpec

_NORM = "norm/"
_MOST_OVERFLOWS = 32
"""The most overflows in a row; a loss scale of 2 ** 16 is 1 after half of them."""
_LEAST_CLIENTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The largest norm that is not clipped, and the largest one that is not refused."""

    clip: float = math.inf
    refuse: float = math.inf


class NormGuard:
    """Bounds the norm of a contribution by multiples of the usual norm of those before it.

    The usual norm is the median of the last accepted norm of each client, so that a client counts
    once, however often it contributes. Where clients' data differ, all norms fall while a round
    goes on, and jump when the next one begins with averaged weights. So the bounds go by the
    largest median so far, which is halved in the time of `memory` contributions.

    A median is that of three clients at least, or the first one could set the bounds of all others
    by itself. The third client is compared with the larger norm of the two before it; of two
    clients, the second is compared with the first.

    Args:
        spec: The multiples, and the number of clients that the median is of.
        clients: The number of clients that may contribute; if it is below three, that many suffice.
        memory: The number of contributions in which a former median is halved.
    """

    def __init__(self, spec: GuardSpec, *, clients: int, memory: int) -> None:
        self._spec = spec
        self._least = min(_LEAST_CLIENTS, clients, spec.window)
        self._decay = 0.5 ** (1.0 / memory)
        self._usual = 0.0
        self._count = 0
        # The client that contributed last is last.
        self._last: dict[str, float] = {}

    def bounds_of(self, client: str) -> Bounds:
        """Return the bounds of a client's next contribution; infinite for the first ones."""
        usual, others = self._usual, self._last.keys() - {client}
        if len(self._last) < self._least and len(others) == self._least - 1:
            usual = max(self._last.values(), default=0.0)
        return self._bounds(usual if self._count >= self._spec.after else 0.0)

    def first_bounds(self, norms: Collection[float]) -> Bounds:
        """Return the bounds of contributions to one step, which come before those of `bounds_of`.

        They are compared with one another, so there are none for fewer than three.
        """
        if self._count >= self._spec.after or len(norms) < _LEAST_CLIENTS:
            return Bounds()
        return self._bounds(max(self._usual, median_low(norms)))

    def add(self, client: str, norm: float) -> None:
        """Add the norm of a contribution that was accepted, after it was clipped."""
        self._last.pop(client, None)
        self._last[client] = norm
        if len(self._last) > self._spec.window:
            del self._last[next(iter(self._last))]
        self._count += 1
        if len(self._last) >= self._least:
            # The lower one of two in the middle, so that half of the clients cannot raise it.
            self._usual = max(self._usual * self._decay, median_low(self._last.values()))

    def _bounds(self, usual: float) -> Bounds:
        # A norm of 0 is no measure, as in a run whose first gradients vanish.
        return Bounds(
            clip=self._spec.clip_above * usual or math.inf,
            refuse=self._spec.refuse_above * usual or math.inf,
        )

    def state(self) -> dict[str, float]:
        """Return the numbers of this guard by name."""
        norms = {_NORM + client: norm for client, norm in self._last.items()}
        return {"usual_norm": self._usual, "num_norms": self._count, **norms}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Continue from what `state` returned; other names are ignored."""
        self._usual, self._count = state["usual_norm"], int(state["num_norms"])
        self._last = {k.removeprefix(_NORM): v for k, v in state.items() if k.startswith(_NORM)}


def require_in_proportion(client: str, norm: float, bounds: Bounds) -> None:
    """Refuse a contribution that is far larger than those before it.

    Raises:
        GradExploded: Its norm is above `bounds.refuse`.
    """
    if norm > bounds.refuse:
        raise GradExploded(
            f"the contribution of {client} has norm {norm:.3g}, but after the last ones at most "
            f"{bounds.refuse:.3g} is accepted (guard.refuse_above, or for a client that is out of "
            "proportion throughout guard.clip_above); nothing was changed; lower the learning rate "
            "or look at this batch"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardCounts:
    """The contributions that were clipped, those that were refused, and the quarantines."""

    clipped: int = 0
    refused: int = 0
    quarantines: int = 0

    def __add__(self, other: "GuardCounts") -> "GuardCounts":
        return GuardCounts(
            clipped=self.clipped + other.clipped,
            refused=self.refused + other.refused,
            quarantines=self.quarantines + other.quarantines,
        )

    def __sub__(self, other: "GuardCounts") -> "GuardCounts":
        return GuardCounts(
            clipped=self.clipped - other.clipped,
            refused=self.refused - other.refused,
            quarantines=self.quarantines - other.quarantines,
        )


@dataclass(slots=True, kw_only=True)
class ClientRecord:
    """The counts of one client.

    `clipped` and `refused` are contributions, and `quarantines` the times that the client was
    excluded. `clipped_in_a_row` counts the accepted ones since the last that was not clipped, and
    `in_a_row` the refusals since the last accepted one, and `overflows` the overflows since then,
    which are no refusals. `until` is the end of the last quarantine, in seconds.
    """

    clipped: int = 0
    clipped_in_a_row: int = 0
    refused: int = 0
    quarantines: int = 0
    in_a_row: int = 0
    overflows: int = 0
    until: float = -math.inf

    @property
    def counts(self) -> GuardCounts:
        """The counts that are reported."""
        return GuardCounts(clipped=self.clipped, refused=self.refused, quarantines=self.quarantines)


class Quarantine:
    """Counts the contributions of clients, and excludes one after refusals in a row for some time.

    Args:
        spec: The number of refusals, and the times of quarantines.
        most_clients: The most clients of which it has a record. For another one, the client that
            stood out first is forgotten.
    """

    def __init__(self, spec: GuardSpec, most_clients: int) -> None:
        self._spec = spec
        self._most_clients = most_clients
        self._forgotten = GuardCounts()
        self.records: dict[str, ClientRecord] = {}

    @property
    def counts(self) -> GuardCounts:
        """The counts of all clients together."""
        # A copy, because another thread may ask for the counts.
        records = tuple(self.records.values())
        return sum((record.counts for record in records), self._forgotten)

    def add(self, counts: GuardCounts) -> None:
        """Add the counts of another server of the run."""
        self._forgotten += counts

    def is_free(self, client: str, now: float) -> bool:
        """Return whether a client is not in quarantine at this time."""
        record = self.records.get(client)
        return record is None or now >= record.until

    def require_free(self, client: str, now: float) -> None:
        """Refuse a client that is in quarantine.

        Raises:
            Quarantined: It is; the error has the time that is left.
        """
        if not self.is_free(client, now):
            left = self.records[client].until - now
            raise Quarantined(
                f"{client} is in quarantine for {left:.0f} s, because {self._spec.refusals} "
                "contributions in a row were refused; look for the cause, and come back later",
                retry_after_s=left,
            )

    def bounds_of(self, client: str, bounds: Bounds) -> Bounds:
        """Return the bounds of a client's next contribution, from those of the norms before it.

        A large gradient now and then is clipped. A client whose last ones were all clipped is out
        of proportion throughout, so what would be clipped is refused.
        """
        record = self.records.get(client)
        if record is None or record.clipped_in_a_row < self._spec.refusals:
            return bounds
        return Bounds(clip=bounds.clip, refuse=bounds.clip)

    def accept(self, client: str, *, clipped: bool) -> None:
        """Count an accepted contribution."""
        # Clients that never stand out leave no record, however many come and go.
        if not clipped and client not in self.records:
            return
        record = self._record(client)
        record.clipped += clipped
        record.clipped_in_a_row = record.clipped_in_a_row + 1 if clipped else 0
        record.in_a_row = record.overflows = 0

    def refuse(self, client: str, now: float, *, is_overflow: bool = False) -> float:
        """Count a refused contribution; return the seconds of a quarantine that begins, or 0.

        An overflow is no fault, because the client lowers its loss scale, unless there is no end.
        """
        spec, record = self._spec, self._record(client)
        if is_overflow and record.overflows < _MOST_OVERFLOWS:
            record.overflows += 1
            return 0.0
        record.refused += 1
        record.in_a_row += 1
        if record.in_a_row < spec.refusals or not spec.quarantine_s:
            return 0.0
        # 2.0 ** 1024 would overflow.
        doubled = spec.quarantine_s * 2.0 ** min(record.quarantines, 1000)
        seconds = min(doubled, spec.quarantine_most_s)
        record.until = now + seconds
        record.quarantines += 1
        record.in_a_row = 0
        return seconds

    def _record(self, client: str) -> ClientRecord:
        if client not in self.records and len(self.records) >= self._most_clients:
            self._forgotten += self.records.pop(next(iter(self.records))).counts
        return self.records.setdefault(client, ClientRecord())
