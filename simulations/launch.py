"""Runs a Flower app with `flwr run` on a SuperLink of its own, and ends all its processes."""

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
"""Flower's states of a run that has not started."""
LINES_IN_AN_ERROR = 30
SECONDS_TO_END = 5.0
"""Seconds that processes have to end after SIGTERM, and again after SIGKILL."""
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Signals that end a process at once: of `kill`, a terminal that is closed, and Ctrl-Backslash."""
_OF_OTHERS = ("FLWR_", "RAY_ADDRESS", "RAY_NAMESPACE", "RAY_RUNTIME_ENV", "RAY_JOB_", "RAY_CLIENT_")
"""Beginnings of variables that point Flower or Ray to another SuperLink, cluster or folder."""
_LOOPBACK = "127.0.0.1,localhost,::1"
_NO_PROXY = ("no_proxy", "NO_PROXY", "no_grpc_proxy")


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

    The SuperLink listens on a free loopback port, keeps its files in a temporary folder and
    installs nothing. Its working directory is in that folder, because the modules of a checkout
    would shadow the app's. On return or error, it and every process that it started have ended.

    Args:
        app_dir: Folder of the app's `pyproject.toml`.
        run_config: Overrides of `[tool.flwr.app.config]`; a string may be long and have newlines.
        num_clients: Number of simulated clients.
        log_path: File for the SuperLink's own log.
        workers: The number of clients that work at once, however few cores there are; 0 for all.
        start_timeout_s: Seconds for the SuperLink to answer, and for the run to start.
        commands: Folder of Flower's commands, which is searched before PATH.
        on_output: Called with each line that the run prints, without its newline.

    Raises:
        ConfigError: Flower is not installed with its simulation extra.
        DeadlineExceeded: The SuperLink or the run did not start in time.
        Internal: The run ended but did not complete; the text has its last lines.
    """
    tail: deque[str] = deque(maxlen=LINES_IN_AN_ERROR)

    def take(line: str) -> None:
        tail.append(line)
        on_output(line)

    # Ray puts Unix sockets in it, whose paths have at most 103 bytes, and $TMPDIR may be long.
    with TemporaryDirectory(prefix="fedsplit-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        env = _environment(home, commands)
        config_path = home / "run.toml"
        config_path.write_text(tomli_w.dumps(dict(run_config)), encoding="utf-8")
        command = ["flwr", "run", str(app_dir.resolve()), "--run-config", str(config_path)]
        command += ["--federation-config", _federation_config(num_clients, workers), "--stream"]
        with _exit_on_signals(), _superlink(env, log_path, start_timeout_s):
            _follow(command, env, start_timeout_s, take)
            status = _status(env)
    _require_completed(status, start_timeout_s, tail, log_path)


def _environment(home: Path, commands: Path) -> dict[str, str]:
    """Return the environment of Flower's and Ray's processes, which write only to `home`."""
    (home / "start").mkdir()
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(_OF_OTHERS)}
    return {
        **inherited,
        **_without_proxy_on_loopback(inherited),
        "PATH": f"{commands}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": _module_path(),
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "RAY_TMPDIR": str(home),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Otherwise Ray drops equal lines of different clients.
        "RAY_DEDUP_LOGS": "0",
        # Otherwise Ray hides the GPUs from clients, which ask it for none.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def _module_path() -> str:
    """Return the folders where Flower's processes, which start elsewhere, find a user's modules.

    These are the current directory, which `python -m` searches as well, and those of PYTHONPATH.
    The app's own modules precede them.
    """
    listed = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.pathsep.join(str(Path.cwd() / path) for path in ("", *listed))


def _without_proxy_on_loopback(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with which no process calls another one here through a proxy.

    The proxy itself stays, because a model may be downloaded through it.
    """
    # A program reads the first of these that it knows, so each one has what any of them has.
    listed = [environment[name] for name in _NO_PROXY if environment.get(name)]
    return dict.fromkeys(_NO_PROXY, ",".join([*listed, _LOOPBACK]))


def _federation_config(num_clients: int, workers: int) -> str:
    """Return Flower's settings for so many simulated clients."""
    # Ray runs one client per CPU, and takes the number of CPUs from this setting.
    at_once = min(workers or num_clients, num_clients)
    return f"num-supernodes={num_clients} init-args-num-cpus={at_once} client-resources-num-cpus=1"


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Turn signals into an exception inside the block, so that `finally` clauses run."""
    # Python allows signal handlers in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A signal that is ignored stays ignored, as SIGHUP under `nohup`.
    numbers = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {n: signal.signal(n, lambda number, frame: sys.exit(128 + number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _superlink(env: Mapping[str, str], log_path: Path, timeout_s: float) -> Iterator[None]:
    """Run a SuperLink inside the block, as the default one of `flwr` in this environment."""
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
        # Its SuperExec has started, and leads the session of all further processes.
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
            # The session identifies the process's descendants, which `_end` ends.
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
    # Another process can take the port before the SuperLink does; then it ends with an error.
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
    # Not `urlopen`, which asks the proxy of the environment.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=1.0):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _follow(
    command: list[str], env: Mapping[str, str], timeout_s: float, take: Callable[[str], None]
) -> None:
    """Submit the run, and pass on its output until it ends or has not started in time."""
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
        # Closes the pipe and reaps the process.
        process.communicate()


def _status(env: Mapping[str, str]) -> tuple[str, str]:
    """Return the status and details of the SuperLink's one run."""
    # The exit code of `flwr run` is 0 for a run that failed, so the SuperLink is asked.
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


def _require_completed(
    status: tuple[str, str], timeout_s: float, tail: deque[str], log_path: Path
) -> None:
    state, details = status
    if state == "finished:completed":
        return
    last = "\n".join(tail)
    if state in WAITING:
        raise DeadlineExceeded(
            f"the run is still {state} after {timeout_s:g} s; see {log_path}, or raise "
            f"launch.start_timeout_s. The last lines of the run:\n{last}"
        )
    raise Internal(
        f"the run did not complete: {state} ({details}); see the SuperLink's log {log_path}. "
        f"The last lines of the run:\n{last}"
    )


def _end(sessions: set[int]) -> None:
    """End every process of these sessions: with SIGTERM, then with SIGKILL."""
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
        # A zombie has ended; in some containers no process reaps it.
        return os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False
