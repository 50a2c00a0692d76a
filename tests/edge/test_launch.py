"""`flwr run` on a SuperLink of our own: what the app gets, how it ends, and that nothing stays."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from fedsplit.errors import ConfigError, DeadlineExceeded, Internal
from fedsplit.runs.folder import RunFolder
from simulations.launch import _exit_on_signals, run_flwr
from simulations.single import run_one
from tests.edge.federation import federate, joined, spec_for, without_seconds

pytestmark = pytest.mark.slow

PYPROJECT = """
[project]
name = "tinyapp"
version = "1.0.0"
description = "An app that says what it got"
dependencies = ["a-package-that-nobody-has-published"]

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "tinyapp.apps:server"
clientapp = "tinyapp.apps:client"

[tool.flwr.app.config]
config = ""
folder = ""
module = "os"
end-mark = ""
"""

APPS = '''
import importlib, os, sys, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
client = ClientApp()

@server.main()
def main(grid, context):
    given = context.run_config
    importlib.import_module(given["module"])
    print("SESSION", os.getsid(0), flush=True)
    while len(nodes := list(grid.get_node_ids())) < 3:
        time.sleep(0.05)
    for call in (1, 2):
        asked = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes]
        replies = [reply.content["said"] for reply in grid.send_and_receive(asked, timeout=90)]
        assert [reply["calls"] for reply in replies] == [call] * 3
        Path(given["folder"], f"pids-{call}").write_text(" ".join(str(r["pid"]) for r in replies))
    Path(given["folder"], "config").write_text(given["config"], encoding="utf-8")
    print("DONE", Path.cwd().name, flush=True)
    Path(given["end-mark"]).touch()
    raise ValueError("the app was asked to fail")

@client.query()
def query(message, context):
    """Answers when all three clients are here: none may wait for another one's place."""
    importlib.import_module(context.run_config["module"])
    calls = context.state.get("said", ConfigRecord({"calls": 0}))["calls"] + 1
    here = Path(context.run_config["folder"])
    Path(here, f"here-{calls}-{context.node_config['partition-id']}").touch()
    while len(list(here.glob(f"here-{calls}-*"))) < context.node_config["num-partitions"]:
        time.sleep(0.02)
    context.state["said"] = ConfigRecord({"calls": calls, "pid": os.getpid()})
    return Message(RecordDict({"said": context.state["said"]}), reply_to=message)
'''


@pytest.fixture
def app(tmp_path: Path) -> Path:
    package = tmp_path / "app" / "tinyapp"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "apps.py").write_text(APPS, encoding="utf-8")
    (package.parent / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    return package.parent


@pytest.fixture
def mark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A mark in the environment that every process of the run inherits."""
    value = str(tmp_path_factory.mktemp("mark"))
    os.environ["FEDSPLIT_TEST_MARK"] = value
    yield value
    del os.environ["FEDSPLIT_TEST_MARK"]


def left_behind(mark: str, lines: list[str]) -> list[psutil.Process]:
    """Processes that carry the mark, or belong to the session the app said it is in."""
    sessions = {int(line.split()[1]) for line in lines if line.startswith("SESSION")}
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            marked = process.environ().get("FEDSPLIT_TEST_MARK") == mark
            if marked or os.getsid(process.pid) in sessions:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def run(app: Path, lines: list[str], **options: object) -> None:
    """Run the app with three clients: more than the cores of a small machine."""
    defaults = {"num_clients": 3, "run_config": {}, "on_output": lines.append}
    run_flwr(app, RunFolder(app), **defaults | options)


OF_OTHERS = {
    **dict.fromkeys(["http_proxy", "https_proxy", "all_proxy", "grpc_proxy"], "http://127.0.0.1:9"),
    **dict.fromkeys(["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"], "http://127.0.0.1:9"),
    "no_proxy": "example.org",
    "RAY_ADDRESS": "127.0.0.1:9",
    "RAY_NAMESPACE": "another",
    "FLWR_DATABASE": "/nowhere/state.db",
    "FLWR_INTERNAL_GRPC_CONTROL_API": "127.0.0.1:9",
}
"""Variables that a user has for other clusters, other SuperLinks and the internet."""


def test_a_run_gets_its_config_and_all_clients_and_its_failure_is_an_error(
    app: Path, mark: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The run of the default app completes in test_deployed.py."""
    for name, value in OF_OTHERS.items():
        monkeypatch.setenv(name, value)
    users = tmp_path / "users"
    (users / "tinyapp").mkdir(parents=True)  # does not hide the app's own
    (users / "tinyapp" / "__init__.py").write_text("raise ImportError('not this one')")
    (users / "users_own.py").touch()
    monkeypatch.chdir(users)
    config = "".join(f'key{i}: "it\'s" # \t\\ {{}} = [é]\n' for i in range(300))
    lines: list[str] = []
    with pytest.raises(Internal, match="did not complete: finished:failed") as caught:
        run(app, lines, run_config={"config": config, "folder": str(app), "module": "users_own"})
    assert "DONE start" in lines  # neither the checkout nor the app's folder
    assert (app / "config").read_text(encoding="utf-8") == config
    assert len(set((app / "pids-1").read_text().split())) == 3
    assert "Created run" in (app / "superlink.log").read_text(encoding="utf-8")
    assert "ValueError: the app was asked to fail" in str(caught.value)
    assert str(app / "superlink.log") in str(caught.value)
    assert left_behind(mark, lines) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_that_ends_the_driver_runs_its_cleanup(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, _exit_on_signals():
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) is before


def test_an_ignored_signal_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with _exit_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stopped_driver_stops_everything(app: Path, mark: str) -> None:
    lines: list[str] = []

    def stop_when_running(line: str) -> None:
        lines.append(line)
        if line.startswith("SESSION"):
            os.kill(os.getpid(), signal.SIGHUP)

    with pytest.raises(SystemExit):
        config = {"folder": str(app)}
        run(app, lines, run_config=config, num_clients=1, on_output=stop_when_running)
    assert left_behind(mark, lines) == []


def test_an_app_that_flower_refuses_is_an_error(app: Path, mark: str) -> None:
    (app / "pyproject.toml").write_text(PYPROJECT.replace('publisher = "tests"', ""))
    with pytest.raises(ConfigError, match="(?s)Flower refused the app in .*publisher"):
        run(app, [])
    assert left_behind(mark, []) == []


def test_a_run_that_does_not_start_is_an_error(app: Path, mark: str, tmp_path: Path) -> None:
    real, fake = Path(sys.executable).parent, tmp_path / "bin"
    fake.mkdir()
    for command in ("flwr", "flower-superlink", "flower-superexec"):
        (fake / command).symlink_to(real / command)
    (fake / "flwr-simulation").write_text("#!/bin/sh\nsleep 600\n")
    (fake / "flwr-simulation").chmod(0o755)
    with pytest.raises(DeadlineExceeded, match="launch.start_timeout_s"):
        run(app, [], start_timeout_s=6.0, commands=fake)
    assert left_behind(mark, []) == []


def test_without_flower_the_error_says_what_to_install(
    app: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(app))
    with pytest.raises(
        ConfigError, match=r"needs the command flower-superlink.*flwr\[simulation\]"
    ):
        run(app, [], commands=app)


DRIVER = """
import sys
from pathlib import Path
from fedsplit.runs.folder import RunFolder
from simulations.launch import run_flwr

app = Path(sys.argv[1])
run_flwr(app, RunFolder(app), run_config={"folder": str(app)}, num_clients=1)
"""


def test_a_driver_that_is_killed_leaves_no_process(app: Path, mark: str) -> None:
    command = [sys.executable, "-c", DRIVER, str(app)]
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        for line in driver.stdout or ():
            lines.append(line)
            if line.startswith("SESSION"):
                driver.kill()
    assert lines[-1].startswith("SESSION")
    deadline = time.monotonic() + 60
    while left_behind(mark, lines):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_run_whose_processes_are_killed_ends_with_the_same_weights(
    tmp_path: Path, mark: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The SuperLink goes in the middle of the second round, and then the new simulation."""
    words = ["train.rounds=3", "train.local_steps=50", "train.save_every=1", "sharding=iid"]
    words.append("clients=2")
    spec = spec_for(tmp_path, *words, "launch=flwr")
    folder = RunFolder(Path(spec.launch.run_dir, spec.name))
    victims = ["flower-superlink", "flwr-simulation"]
    over = threading.Event()

    def kill_in_turn() -> None:
        began = 0.0
        while not over.wait(0.1) and victims:
            if folder.rounds() and kill_one(mark, victims[0], began):
                began = time.time()  # the next victim is one of the next attempt
                victims.pop(0)

    killer = threading.Thread(target=kill_in_turn)
    killer.start()
    try:
        run_one(spec)
    finally:
        over.set()
        killer.join()
    gone = [line for line in capsys.readouterr().out.splitlines() if "; restart " in line]
    assert gone == [
        "the SuperLink is gone; restart 1 of 5 in 1 s, from round 2",
        "the simulation is gone; restart 2 of 5 in 2 s, from round 2",
    ]
    inline = federate(spec_for(tmp_path, *words, "name=inline"))
    undisturbed, recovered = joined(inline), joined(folder)
    assert all(torch.equal(undisturbed[name], recovered[name]) for name in undisturbed)
    assert without_seconds(folder.rounds()) == without_seconds(inline.rounds())
    assert left_behind(mark, []) == []


def kill_one(mark: str, program: str, began: float) -> bool:
    """Kill the process of this program that has lived a second, but not since before `began`."""
    for process in left_behind(mark, []):
        with suppress(psutil.Error):
            names = {Path(word).name for word in process.cmdline()[:2]}
            if program in names and began < process.create_time() < time.time() - 1:
                process.kill()
                return True
    return False
