"""The loop that starts a run again: what it counts, when it gives up, and which processes count."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedsplit.errors import ConfigError, Diverged, FedsplitError, Internal
from fedsplit.flower import client_app, server_app
from fedsplit.flower.inline import run_inline
from fedsplit.flower.processes import end_all, roles_of
from fedsplit.flower.remote_run import _id_in, is_own_error
from fedsplit.flower.supervision import Backend, supervise
from fedsplit.runs.folder import RunFolder
from tests.edge.federation import run_config, spec_for, without_seconds


class Scripted(Backend):
    """Each attempt ends as a script says: the rounds by then, and what is gone or the error."""

    def __init__(self, *attempts: tuple[int, str | FedsplitError]) -> None:
        self._attempts = iter(attempts)
        self._rounds = 0

    @property
    def rounds(self) -> int:
        return self._rounds

    @property
    def resumes_from(self) -> str:
        return f"from round {self._rounds + 1}"

    @property
    def last_lines(self) -> str:
        return "the last line"

    def attempt(self) -> str:
        self._rounds, end = next(self._attempts)
        if isinstance(end, FedsplitError):
            raise end
        return end


def supervised(backend: Backend, restarts: int) -> tuple[list[str], list[float]]:
    lines: list[str] = []
    waits: list[float] = []
    supervise(backend, restarts=restarts, say=lines.append, wait=waits.append)
    return lines, waits


GONE = "the simulation is gone"


def test_a_restart_is_one_line_and_the_pause_grows() -> None:
    lines, waits = supervised(Scripted(*[(2, GONE)] * 7, (3, "")), restarts=7)
    assert lines[0] == f"{GONE}; restart 1 of 7 in 1 s, from round 3"
    assert lines[-1] == f"{GONE}; restart 7 of 7 in 30 s, from round 3"
    assert waits == [1, 2, 4, 8, 16, 30, 30]


def test_another_finished_round_resets_the_count_but_a_repeated_one_does_not() -> None:
    rounds = [1, 1, 2, 1, 2, 3]
    lines, waits = supervised(Scripted(*((n, GONE) for n in rounds), (4, "")), restarts=3)
    assert [int(line.split("restart ")[1][0]) for line in lines] == [1, 2, 1, 2, 3, 1]
    assert waits == [1, 2, 1, 2, 4, 1]


@pytest.mark.parametrize("restarts", [0, 2])
def test_without_restarts_left_the_error_has_what_was_gone_and_the_last_lines(
    restarts: int,
) -> None:
    with pytest.raises(
        Internal, match=rf"(?s){GONE}.*started again {restarts} times.*the last line"
    ):
        supervised(Scripted(*[(0, GONE)] * 9), restarts)


def test_an_error_of_the_run_itself_is_final() -> None:
    with pytest.raises(Diverged, match="as it was"):
        supervised(Scripted((0, GONE), (1, Diverged("as it was"))), restarts=5)


LOG = """WARNING: client-1: fedsplit.errors.ConnectionLost: no trunk answers
Traceback (most recent call last):
  File "server_app.py", line 1, in main
fedsplit.errors.Diverged: round 2: the loss is inf (twice)
fedsplit.errors.DeadlineExceeded: 0 of clients=2 are connected after 120 s
fedsplit.errors.ConfigError: runs/a is still trained by another process; stop that one"""


@pytest.mark.parametrize(
    ("details", "is_own"),
    [
        ("ServerApp failed with exception: round 2: the loss is inf (twice)", True),
        ("Simulation failed with exception: round 2: the loss is inf (twice)", True),
        ("ServerApp failed with exception: [Errno 111] Connection refused", False),
        ("ServerApp failed with exception: 0 of clients=2 are connected after 120 s", False),
        ("ServerApp failed with exception: runs/a is still trained by another process; s", False),
        ("Task failed with unknown error.", False),
        ("No heartbeat received from the task", False),
        ("", False),
    ],
)
def test_a_run_that_failed_with_an_own_error_is_final(details: str, is_own: bool) -> None:
    assert is_own_error(details, LOG) == is_own


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """The FLWR_HOME of two processes, which look like a SuperLink and its simulation."""
    script = tmp_path / "flower-superlink"
    script.write_text(f"#!/bin/sh\n{tmp_path}/flwr-simulation & sleep 600 & wait\n")
    (tmp_path / "flwr-simulation").write_text("#!/bin/sh\nsleep 600 & (:; sleep 600) & wait\n")
    for file in tmp_path.iterdir():
        file.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    env = {**os.environ, "FLWR_HOME": str(home)}
    with subprocess.Popen([script], env=env, start_new_session=True):
        await_roles(home, {"the SuperLink", "the simulation"})
        yield home
        end_all(home, gently=False)


def await_roles(home: Path, roles: set[str]) -> None:
    deadline = time.monotonic() + 60
    while set(roles_of(home).values()) != roles:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_processes_of_a_run_have_one_role_each_and_their_copies_have_none(home: Path) -> None:
    # The simulation has a child with its own command line, as between fork and exec.
    assert sorted(roles_of(home).values()) == ["the SuperLink", "the simulation"]
    simulation = next(pid for pid, role in roles_of(home).items() if role == "the simulation")
    psutil.Process(simulation).kill()
    await_roles(home, {"the SuperLink"})


def test_a_launcher_that_is_killed_leaves_no_process_and_no_folder(home: Path) -> None:
    command = [sys.executable, "-m", "fedsplit.flower.processes", str(home)]
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert roles_of(home)
    watcher.communicate()  # closes the pipe, as the kernel does for a killed process
    assert not roles_of(home)
    assert not home.exists()


def test_a_state_file_keeps_its_id_and_another_file_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "run.state"
    assert _id_in(state) == _id_in(state) != _id_in(tmp_path / "other.state")
    for text in ("{}", "not json", '{"run-id": "../../etc"}'):
        state.write_text(text)
        with pytest.raises(ConfigError, match="holds no run id.*remove it to begin anew"):
            _id_in(state)


def test_an_app_that_is_started_again_with_the_id_of_a_run_continues_this_run(
    tmp_path: Path,
) -> None:
    spec = spec_for(tmp_path, "train.rounds=2", "clients=1", "train.save_every=0")
    runs = Path(spec.launch.run_dir)

    def started(run_id: str) -> RunFolder:
        config = run_config(spec) | {"run-id": run_id}
        run_inline(server_app.app, client_app.app, num_clients=1, run_config=config)
        folder = RunFolder.of_id(runs, spec.name, run_id)
        assert folder
        return folder

    folder = started("0123456789abcdef")
    rounds = folder.rounds()
    before = folder.model.stat().st_mtime_ns
    assert started("0123456789abcdef").path == folder.path
    assert folder.model.stat().st_mtime_ns == before  # a finished run is left alone
    shutil.rmtree(folder.model)  # as if killed before the result, without a checkpoint
    assert started("0123456789abcdef").path == folder.path
    assert without_seconds(folder.rounds()) == without_seconds(rounds)
    assert folder.model.stat().st_mtime_ns != before
    assert started("fedcba9876543210").path.name == "tiny-2"
    assert sorted(path.name for path in runs.iterdir()) == ["tiny", "tiny-2"]
