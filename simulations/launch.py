"""Runs a Flower app with `flwr run` on a SuperLink of its own, and leaves no process behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import tomli_w

from fedsplit.errors import ConfigError, DeadlineExceeded, Internal

WAITING = ("pending", "starting")
LINES_IN_AN_ERROR = 30
SECONDS_TO_END = 5.0


def run_flwr(
    app_dir: Path,
    *,
    run_config: Mapping[str, str | int | float | bool],
    num_clients: int,
    log_path: Path,
    workers: int = 0,
    start_timeout_s: float = 120.0,
    commands: Path = Path(sys.executable).parent,
    on_output: Callable[[str], None] = print,
) -> None:
    """Run the app in `app_dir` to its end, simulated, as `flwr run` does.

    The SuperLink listens on a free loopback port, keeps its files in a temporary folder, starts
    there (not in a checkout, whose modules would win over the app's) and installs nothing. It
    and everything it started is gone on return, whatever happened.

    Args:
        app_dir: Folder of the app's `pyproject.toml`.
        run_config: Overrides of `[tool.flwr.app.config]`; a string may be long and have newlines.
        num_clients: Number of simulated clients.
        log_path: File that takes the SuperLink's own log.
        workers: How many clients work at once, however few cores there are; 0: all of them.
        start_timeout_s: Seconds for the SuperLink to come up, and for the run to start.
        commands: Folder of Flower's commands; one that is not there is looked for in PATH.
        on_output: Called with each line that the run prints, without its newline.

    Raises:
        ConfigError: Flower is not installed with its simulation extra.
        DeadlineExceeded: The SuperLink or the run did not start in time.
        Internal: The run ended in any other way than completed; the text has its last lines.
    """
    tail: deque[str] = deque(maxlen=LINES_IN_AN_ERROR)

    def take(line: str) -> None:
        tail.append(line)
        on_output(line)

    # Ray puts Unix sockets below: their paths have at most 103 bytes, and $TMPDIR may be long.
    with TemporaryDirectory(prefix="fedsplit-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        env = _environment(home, commands)
        config_path = home / "run.toml"
        config_path.write_text(tomli_w.dumps(dict(run_config)), encoding="utf-8")
        command = ["flwr", "run", str(app_dir.resolve()), "--run-config", str(config_path)]
        command += ["--federation-config", _federation_config(num_clients, workers), "--stream"]
        with _exit_on_sigterm(), _superlink(env, log_path, start_timeout_s):
            _follow(command, env, start_timeout_s, take)
            status = _status(env)
    _judge(status, start_timeout_s, tail, log_path)


def _environment(home: Path, commands: Path) -> dict[str, str]:
    """Return the environment of Flower's and Ray's processes; `home` holds all they write."""
    (home / "start").mkdir()
    return {
        **os.environ,
        "PATH": f"{commands}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "RAY_TMPDIR": str(home),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",  # or it drops lines that clients print alike
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or it hides the GPUs from clients
    }


def _federation_config(num_clients: int, workers: int) -> str:
    """Ray runs as many clients at once as it has CPUs, and believes the number it is told."""
    at_once = min(workers or num_clients, num_clients)
    return f"num-supernodes={num_clients} init-args-num-cpus={at_once} client-resources-num-cpus=1"


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that `finally` runs; only a main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _superlink(env: Mapping[str, str], log_path: Path, timeout_s: float) -> Iterator[None]:
    """A SuperLink that answers, and is the default one of `flwr` under this environment."""
    port = _free_port()
    home = Path(env["FLWR_HOME"])
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n",
        encoding="utf-8",
    )
    command = ["flower-superlink", "--insecure", "--simulation"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log_path.open("ab") as log:
        process = _start(command, env, home / "start", log.fileno())
    sessions = {process.pid}
    try:
        _await_health(process, port, timeout_s, log_path)
        # Its SuperExec is there by now and leads the session that all others will belong to.
        sessions |= {os.getsid(child.pid) for child in psutil.Process(process.pid).children()}
        yield
    finally:
        _end(sessions)
        process.wait()


def _start(
    command: list[str], env: Mapping[str, str], cwd: Path, stdout: int
) -> "subprocess.Popen[str]":
    try:
        return subprocess.Popen(
            command,
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            encoding="utf-8",
            errors="replace",
        )
    except FileNotFoundError as exc:
        raise ConfigError(
            f"launch=flwr needs the command {command[0]}, which is not there; "
            "pip install 'flwr[simulation]', or use launch=inline"
        ) from exc


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _await_health(
    process: "subprocess.Popen[str]", port: int, timeout_s: float, log_path: Path
) -> None:
    deadline = time.monotonic() + timeout_s
    while not _answers(f"http://127.0.0.1:{port}/health"):
        if process.poll() is not None:
            raise Internal(
                f"the SuperLink ended with exit code {process.returncode} before it answered; "
                f"see {log_path}"
            )
        if time.monotonic() > deadline:
            raise DeadlineExceeded(
                f"the SuperLink did not answer within {timeout_s:g} s; see {log_path}, "
                "or raise launch.start_timeout_s"
            )
        time.sleep(0.05)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1.0):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _follow(
    command: list[str], env: Mapping[str, str], timeout_s: float, take: Callable[[str], None]
) -> None:
    """Submit the run and hand on its output until it ends, or has not started in time."""
    process = _start(command, env, Path(env["FLWR_HOME"]) / "start", subprocess.PIPE)

    def give_up_if_waiting() -> None:
        if _status(env)[0] in WAITING:
            process.kill()

    timer = threading.Timer(timeout_s, give_up_if_waiting)
    timer.start()
    try:
        for line in process.stdout or ():
            take(line.rstrip("\n"))
    finally:
        timer.cancel()
        timer.join()
        _end({process.pid})
        process.communicate()


def _status(env: Mapping[str, str]) -> tuple[str, str]:
    """Status and details of the SuperLink's one run; `flwr run` itself exits with 0 if it fails."""
    listed = subprocess.run(
        ["flwr", "ls", "--format", "json"],
        env=dict(env),
        cwd=Path(env["FLWR_HOME"]) / "start",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    try:
        runs = json.loads(listed.stdout)["runs"]
    except (ValueError, KeyError):
        return "unknown", (listed.stderr or listed.stdout).strip()
    return (runs[0]["status"], runs[0]["status-details"]) if runs else ("refused", "no run")


def _judge(status: tuple[str, str], timeout_s: float, tail: deque[str], log_path: Path) -> None:
    state, details = status
    if state == "finished:completed":
        return
    last = "\n".join(tail)
    if state in WAITING:
        raise DeadlineExceeded(
            f"the run is still {state} after {timeout_s:g} s; see {log_path}, or raise "
            f"launch.start_timeout_s. Its last lines:\n{last}"
        )
    raise Internal(
        f"the run did not complete: {state} ({details}); the SuperLink's log is {log_path}. "
        f"Its last lines:\n{last}"
    )


def _end(sessions: set[int]) -> None:
    """End every process of these sessions: first asked, then forced."""
    for stop in (psutil.Process.terminate, psutil.Process.kill):
        deadline = time.monotonic() + SECONDS_TO_END
        for process in _alive(sessions):
            with suppress(psutil.Error):
                stop(process)
        while _alive(sessions) and time.monotonic() < deadline:
            time.sleep(0.05)


def _alive(sessions: set[int]) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if _is_alive_in(process, sessions)]


def _is_alive_in(process: psutil.Process, sessions: set[int]) -> bool:
    try:
        # What ended counts as gone, even where nobody collects it (some containers).
        return os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False
