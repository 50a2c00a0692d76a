"""The slots of a server's calls: who holds one, for how long, and who gives way to whom."""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from fedsplit.errors import DeadlineExceeded, FedsplitError, Overloaded


@dataclass(slots=True, kw_only=True, eq=False)
class Slot:
    """The slot of one call; the lock of its `Slots` guards it.

    Attributes:
        client: The name of the caller, empty if the token does not tell callers apart.
        end: Ends the call with an error, while the server waits for its peer; must not block.
        since: The time since when the server waits for the peer; infinity while the peer waits.
        due: The time until which the peer must have sent or taken the next message.
        setting: The setting that decides `due`, for the text of the error.
        settled: Whether a request of this call was answered, and others may follow.
        error: The error that ended the call, if another thread has ended it.
    """

    client: str
    end: Callable[[FedsplitError], None]
    since: float = math.inf
    due: float = math.inf
    setting: str = ""
    settled: bool = False
    error: FedsplitError | None = None


class Slots:
    """The calls of one kind, at most `total` of them and `per_client` of one client.

    A call whose peer is silent gives way to a new one, first those that were never answered. So
    silent calls cannot keep others out. A call that is in work is never ended, and one that is
    settled only after `settled_s` seconds of silence.

    Args:
        what: What holds a slot, for the text of errors: "streams".
        total: The most slots.
        per_client: The most slots of one client, if the client is known.
        settled_s: The silence in seconds after which a settled call gives way.
        clock: Seconds that do not run backwards.
    """

    def __init__(
        self,
        what: str,
        *,
        total: int,
        per_client: int,
        settled_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what = what
        self._total = total
        self._per_client = per_client
        self._settled_s = settled_s
        self._clock = clock
        self._lock = threading.Lock()
        self._slots: dict[Slot, None] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def in_use(self) -> dict[str, str]:
        """Return how many slots are in use, in total and by the client that has most."""
        with self._lock:
            held = Counter(slot.client for slot in self._slots)
        most = max((count for client, count in held.items() if client), default=0)
        setting = f"limits.{self.what}_per_client"
        return {
            self.what: f"{held.total()} of {self._total}",
            setting: f"{most} of {self._per_client}",
        }

    def longest_silence(self, setting: str) -> float:
        """Return for how many seconds a call has been silent whose time this setting bounds."""
        with self._lock:
            since = [slot.since for slot in self._slots if slot.setting == setting]
        # Infinity stands for a call that the server works on.
        return max(0.0, self._clock() - min(since, default=math.inf))

    def enter(self, slot: Slot) -> None:
        """Add a slot; a silent one may be ended for it.

        Raises:
            Overloaded: All slots are taken, in total or of this client, and none gives way.
        """
        with self._lock:
            gives_way = self._make_room(slot.client)
            self._slots[slot] = None
        # Outside of the lock, since gRPC has locks of its own.
        if gives_way and gives_way.error:
            gives_way.end(gives_way.error)

    def leave(self, slot: Slot) -> None:
        """Remove a slot; a second call does nothing."""
        with self._lock:
            self._slots.pop(slot, None)

    def await_peer(self, slot: Slot, seconds: float, setting: str) -> None:
        """Note that the peer of a call must send or take the next message within `seconds`.

        Raises:
            FedsplitError: Another thread has ended the call.
        """
        with self._lock:
            if slot.error:
                raise slot.error
            slot.since, slot.setting = self._clock(), setting
            slot.due = slot.since + seconds

    def work(self, slot: Slot) -> None:
        """Note that the server works on a call, which is not ended until `await_peer`.

        Raises:
            FedsplitError: Another thread has ended the call.
        """
        with self._lock:
            if slot.error:
                raise slot.error
            slot.since = slot.due = math.inf

    def expire(self) -> None:
        """End the calls whose peers are late."""
        now = self._clock()
        with self._lock:
            late = [slot for slot in self._slots if slot.due <= now]
            for slot in late:
                error = DeadlineExceeded(
                    f"nothing came for {slot.due - slot.since:g} s ({slot.setting}), so the call "
                    "was ended; call again"
                )
                self._end(slot, error)
        for slot in late:
            if slot.error:
                slot.end(slot.error)

    # --- under the lock -----------------------------------------------------------------------

    def _make_room(self, client: str) -> Slot | None:
        """The slot that was ended for a new one of this client; None if there is a free one."""
        own = [slot for slot in self._slots if client and slot.client == client]
        if len(own) >= self._per_client:
            return self._evict(own, f"client {client} has {len(own)} {self.what}")
        if len(self._slots) >= self._total:
            return self._evict(self._slots, f"the server has {self._total} {self.what}")
        return None

    def _evict(self, slots: Collection[Slot], full: str) -> Slot:
        latest = self._clock() - self._settled_s
        silent = [
            slot
            for slot in slots
            if slot.since < math.inf and (slot.since <= latest or not slot.settled)
        ]
        error = Overloaded(
            f"{full}, which is the most; try again later, or raise the limit at the trunk",
        )
        if not silent:
            raise error
        oldest = min(silent, key=lambda slot: (slot.settled, slot.since))
        self._end(oldest, error)
        return oldest

    def _end(self, slot: Slot, error: FedsplitError) -> None:
        slot.error = error
        del self._slots[slot]
