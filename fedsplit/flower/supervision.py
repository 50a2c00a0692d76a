"""The supervision of a run: starts it again when a process of it is gone, with a back-off.

The loop is the same for a SuperLink of the run's own and for a remote one; each is a `Backend`.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

from fedsplit.errors import ConfigError, ConnectionLost, Internal
from fedsplit.flower.control import SuperLink

LINES_IN_AN_ERROR = 30
LONGEST_BACKOFF_S = 30.0
_RECONNECT_S = 1.0
_CLOSE_S = 2.0


class Backend(ABC):
    """The means by which a run is started, and what is known of its progress."""

    @abstractmethod
    def attempt(self) -> str:
        """Start the run, or continue it, and wait for its end.

        Returns:
            "" if the run is completed; otherwise what is gone, so that it must be started again.

        Raises:
            FedsplitError: The run failed, and would fail again.
        """

    @property
    @abstractmethod
    def rounds(self) -> int:
        """The number of the last round that the run has finished."""

    @property
    @abstractmethod
    def resumes_from(self) -> str:
        """Where the next attempt continues, as words."""

    @property
    @abstractmethod
    def last_lines(self) -> str:
        """The last lines of the run's log."""


def supervise(
    backend: Backend,
    *,
    restarts: int,
    say: Callable[[str], None] = print,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Carry out a run, and start it again each time that a process of it is gone.

    Args:
        backend: Carries out one attempt.
        restarts: The restarts in a row without another finished round, after which the run fails.
        say: Called with a line for each restart.
        wait: Called with the seconds before each restart.

    Raises:
        Internal: There are no restarts left; the text has the last lines of the run.
        FedsplitError: The run failed, and would fail again.
    """
    count, farthest = 0, backend.rounds
    while gone := backend.attempt():
        # A run without checkpoints repeats its rounds, so an earlier round is no progress.
        if backend.rounds > farthest:
            count, farthest = 0, backend.rounds
        if count == restarts:
            raise Internal(
                f"the run did not complete: {gone}, and it was started again {count} times "
                f"without finishing a round. The last lines of the run:\n{backend.last_lines}"
            )
        count += 1
        pause_s = backoff_s(count)
        say(f"{gone}; restart {count} of {restarts} in {pause_s:g} s, {backend.resumes_from}")
        wait(pause_s)


def backoff_s(count: int) -> float:
    """Return the seconds before a restart.

    >>> [backoff_s(count) for count in (1, 2, 3, 6, 5000)]
    [1.0, 2.0, 4.0, 30.0, 30.0]

    Args:
        count: The number of the restart, from 1.
    """
    return float(min(2 ** (count - 1), LONGEST_BACKOFF_S))


class LogFollower:
    """Reads the log of a submitted run in a thread, and reconnects if the SuperLink is away.

    Args:
        link: The SuperLink.
        on_line: Called in the thread with each line of the log, without its newline.
    """

    def __init__(self, link: SuperLink, on_line: Callable[[str], None]) -> None:
        self._link = link
        self._on_line = on_line
        self._lost_at: float | None = None
        self._error: OSError | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._guarded, name="log-follower", daemon=True)

    def start(self, run_id: int) -> None:
        """Begin with the log of a run, by Flower's id of it."""
        self._run_id = run_id
        self._thread.start()

    def ended_within(self, seconds: float) -> bool:
        """Wait for the end of the log, which is the end of the run; return whether it is over.

        Raises:
            OSError: `on_line` raised it, as when the reader of an output has closed it.
        """
        self._thread.join(seconds)
        if self._error:
            raise self._error
        return not self._thread.is_alive()

    @property
    def lost_for_s(self) -> float:
        """The time for which the SuperLink has not answered, in seconds."""
        lost_at = self._lost_at
        return 0.0 if lost_at is None else time.monotonic() - lost_at

    def close(self) -> None:
        """Pass on no more lines, and end the thread unless it waits for the SuperLink."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(_CLOSE_S)

    def _guarded(self) -> None:
        try:
            self._follow()
        except OSError as exc:
            self._error = exc

    def _follow(self) -> None:
        known, rest = 0.0, ""
        while not self._closed.is_set():
            try:
                for text, time_of_text in self._link.log(self._run_id, known):
                    self._lost_at, known = None, time_of_text
                    *lines, rest = (rest + text).split("\n")
                    for line in lines:
                        if self._closed.is_set():
                            return
                        self._on_line(line)
                run = self._link.run(self._run_id)
                # A SuperLink that is stopped ends the log as well.
                if run is None or run.is_over:
                    break
            except ConnectionLost:
                self._lost_at = self._lost_at or time.monotonic()
                self._closed.wait(_RECONNECT_S)
            except ConfigError:
                # A SuperLink that was restarted without its database does not know the run.
                break
        if rest and not self._closed.is_set():
            self._on_line(rest)


class Tail:
    """The last lines of a log."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=LINES_IN_AN_ERROR)

    def append(self, line: str) -> None:
        """Add a line."""
        self._lines.append(line)

    def __str__(self) -> str:
        return "\n".join(self._lines)
