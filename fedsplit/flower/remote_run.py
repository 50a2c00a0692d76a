"""A run on a remote SuperLink: submits it, follows it, and finds it again after a restart."""

import json
import re
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

from fedsplit import atomic
from fedsplit.config import from_run_config
from fedsplit.errors import ConfigError, ConnectionLost, Internal
from fedsplit.flower.control import COMPLETED, App, RunConfig, SubmittedRun, SuperLink
from fedsplit.flower.processes import SERVER_APP, is_alive, process_with
from fedsplit.flower.supervision import Backend, LogFollower, Tail
from fedsplit.runs.folder import STILL_TRAINED, RunFolder, is_run_id, new_run_id

_POLL_S = 1.0
_RETRY_S = 2.0
_LOG_S = 10.0
"""The longest wait for the rest of the log of a run that is over, in seconds."""
_ROUND = re.compile(r"\bround +(\d+)/\d+ ")

_MAY_PASS = ("DeadlineExceeded", "StorageError")
"""Errors of a run that passes once its clients are back, or once there is room on the disk."""

T = TypeVar("T")


class RemoteRun(Backend):
    """Carries out each attempt on the same SuperLink, which other programs start and stop.

    The run has an id that is sent with it and kept in a file, so another process with this file
    finds what an earlier one has submitted.

    Args:
        link: The SuperLink.
        app_dir: The folder of the app's `pyproject.toml`.
        config: Overrides of `[tool.flwr.app.config]`.
        state: The file with the id; it is made if it does not exist.
        patience_s: The longest time for which the SuperLink may not answer, in seconds.
        on_line: Called with each line of the run's log, and with what this object does.

    Raises:
        ConfigError: The run config or the file cannot be read.
        StorageError: The file cannot be written.
    """

    def __init__(
        self,
        link: SuperLink,
        app_dir: Path,
        config: RunConfig,
        state: Path,
        *,
        patience_s: float,
        on_line: Callable[[str], None],
    ) -> None:
        run = from_run_config(config)
        self._link = link
        self._app_dir = app_dir
        self._id = _id_in(state)
        self._config = {**config, "run-id": self._id}
        self._name, self._parent = run.name, Path(run.launch.run_dir)
        self._patience_s = patience_s
        self._say = on_line
        self._app: App | None = None
        self._rounds = 0
        self._tail = Tail()

    @property
    def rounds(self) -> int:
        """The number of the last round in the log."""
        return self._rounds

    @property
    def resumes_from(self) -> str:
        """The checkpoint, which only the server's machine has."""
        return "from its last checkpoint"

    @property
    def last_lines(self) -> str:
        """The last lines of the log."""
        return str(self._tail)

    def attempt(self) -> str:
        """Submit the run unless it is there, and follow it until it ends or is gone."""
        run = self._patiently(self._found_or_submitted)
        with closing(LogFollower(self._link, self._take)) as log:
            log.start(run.id)
            return self._follow(run, log)

    def _found_or_submitted(self) -> SubmittedRun:
        # One call, because a submission whose reply was lost must be found and not repeated.
        runs = [run for run in self._link.runs() if run.config.get("run-id") == self._id]
        # A process that was killed in between may have left an earlier one.
        latest = next((run for run in runs if not run.is_over or run.state == COMPLETED), None)
        if latest:
            self._say(f"follows run {latest.id}, which is {latest.state}")
            return latest
        # Packed now, because a run that is there needs no app, and packing takes seconds.
        self._app = self._app or App(self._app_dir)
        flower_id = self._link.submit(self._app, self._config)
        self._say(f"submitted run {flower_id}")
        return SubmittedRun(id=flower_id, state="pending", details="", config=self._config)

    def _follow(self, run: SubmittedRun, log: LogFollower) -> str:
        server: int | None = None
        while True:
            is_over = log.ended_within(_POLL_S)
            if log.lost_for_s > self._patience_s:
                raise ConnectionLost(f"the SuperLink has not answered for {self._patience_s:g} s")
            server = server or self._server_process()
            is_gone = server is not None and not is_alive(server)
            if not (is_over or is_gone):
                continue
            latest = self._patiently(lambda: self._link.run(run.id))
            if latest is None:
                return "the SuperLink was restarted without its runs"
            if latest.state == COMPLETED:
                return ""
            if latest.is_over:
                log.ended_within(_LOG_S)
                if is_own_error(latest.details, self.last_lines):
                    raise Internal(
                        f"the run did not complete: {latest.state} ({latest.details}). The last "
                        f"lines of the run:\n{self.last_lines}"
                    )
                return f"the run is gone ({latest.details})"
            # Flower itself notices this after a minute. It may be over by now.
            with suppress(ConfigError):
                self._patiently(lambda: self._link.stop(run.id))
            return "the ServerApp is gone"

    def _server_process(self) -> int | None:
        """Return the process id of the run's ServerApp if it trains on this machine."""
        folder = RunFolder.of_id(self._parent, self._name, self._id)
        return process_with(folder.lock_file, SERVER_APP) if folder else None

    def _take(self, line: str) -> None:
        if match := _ROUND.search(line):
            self._rounds = max(self._rounds, int(match[1]))
        self._tail.append(line)
        self._say(line)

    def _patiently(self, call: Callable[[], T]) -> T:
        """Return the result of a call of the SuperLink, which is repeated until it answers."""
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                return call()
            except ConnectionLost as exc:
                left_s = deadline - time.monotonic()
                if left_s < 0:
                    raise
                self._say(f"{exc}; tries again for {left_s:.0f} s")
                time.sleep(_RETRY_S)


def is_own_error(details: str, log: str) -> bool:
    """Return whether a run failed with an error of fedsplit, and would fail with it again.

    Args:
        details: Flower's reason for the end, which has the text of an exception without its class.
        log: The last lines of the log, which has the class in a traceback. It may have other
            errors, such as those of clients.
    """
    text = details.partition(" failed with exception: ")[2].partition("\n")[0]
    # An earlier process of the run may be frozen, and ends when Flower has given it up.
    if not text or STILL_TRAINED in text:
        return False
    named = re.search(rf"fedsplit\.errors\.(\w+): {re.escape(text)}", log)
    return named is not None and named[1] not in _MAY_PASS


def _id_in(state: Path) -> str:
    """Return the run id in a file, which is made if it does not exist.

    Raises:
        ConfigError: The file is of another program, or damaged.
        StorageError: The file cannot be written.
    """
    if not state.exists():
        atomic.write_text(state, json.dumps({"run-id": new_run_id()}))
    try:
        run_id = str(json.loads(state.read_text(encoding="utf-8"))["run-id"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigError(f"{state} holds no run id ({exc!r}); remove it to begin anew") from exc
    if not is_run_id(run_id):
        raise ConfigError(f"{state} holds no run id but {run_id!r}; remove it to begin anew")
    return run_id
