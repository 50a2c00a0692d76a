"""Runs a Flower app on a SuperLink of its own, starts it again, and ends all its processes."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fedsplit.errors import ConfigError, ConnectionLost, DeadlineExceeded, Internal
from fedsplit.flower.control import COMPLETED, WAITING, App, RunConfig, SubmittedRun, SuperLink
from fedsplit.flower.processes import CLIENT, ROLES, end_all, roles_of
from fedsplit.flower.supervision import Backend, LogFollower, Tail, supervise
from fedsplit.runs.folder import RunFolder

_POLL_S = 0.5
"""Seconds between two looks at the processes of a run."""
_LOG_S = 10.0
"""The longest wait for the rest of the log of a run that is over, in seconds."""
_SUPERLINK_GONE = "the SuperLink is gone"
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Signals that end a process at once: of `kill`, a terminal that is closed, and Ctrl-Backslash."""
_OF_OTHERS = ("FLWR_", "RAY_ADDRESS", "RAY_NAMESPACE", "RAY_RUNTIME_ENV", "RAY_JOB_", "RAY_CLIENT_")
"""Beginnings of variables that point Flower or Ray to another SuperLink, cluster or folder."""
_LOOPBACK = "127.0.0.1,localhost,::1"
_NO_PROXY = ("no_proxy", "NO_PROXY", "no_grpc_proxy")


def run_flwr(
    app_dir: Path,
    folder: RunFolder,
    *,
    run_config: RunConfig,
    num_clients: int,
    workers: int = 0,
    ray_address: str = "",
    restarts: int = 0,
    start_timeout_s: float = 120.0,
    commands: Path = Path(sys.executable).parent,
    on_output: Callable[[str], None] = print,
    on_restart: Callable[[str], None] = print,
) -> None:
    """Run the app in `app_dir` to its end, simulated, as `flwr run` does.

    The SuperLink listens on a free loopback port, keeps its files in a temporary folder and
    installs nothing. Its working directory is in that folder, because the modules of a checkout
    would shadow the app's. On return or error, it and every process that it started have ended.
    They also end if this process is killed.

    If one of these processes is gone before the ServerApp ends, all of them are ended, and the app
    is started again. It must then continue by itself. The key `end-mark` of the run config is a
    file that the ServerApp makes before it returns or raises.

    Args:
        app_dir: Folder of the app's `pyproject.toml`.
        folder: The run's folder, which has its rounds; `superlink.log` is the SuperLink's own log.
        run_config: Overrides of `[tool.flwr.app.config]`; a string may be long and have newlines.
        num_clients: Number of simulated clients.
        workers: The number of clients that work at once, however few cores there are; 0 for all.
        ray_address: The Ray cluster that runs the clients, host:port; by default a new one.
        restarts: The restarts in a row without another finished round, after which the run fails.
            With 0, a run whose client is gone goes on without it.
        start_timeout_s: Seconds for the SuperLink to answer, and for the run to start.
        commands: Folder of Flower's commands, which is searched before PATH.
        on_output: Called with each line that the run prints, without its newline.
        on_restart: Called with a line for each restart.

    Raises:
        ConfigError: Flower is not installed with its simulation extra, or refuses the app.
        DeadlineExceeded: The SuperLink or the run did not start in time.
        Internal: The run ended but did not complete; the text has its last lines.
    """
    app = App(app_dir)  # packed once, because that reads every file of the app
    # Ray runs one client per CPU. With a number of CPUs, it makes a cluster that has as many.
    simulation = {"num_supernodes": num_clients, "client_resources_num_cpus": 1}
    if not ray_address:
        simulation["init_args_num_cpus"] = min(workers or num_clients, num_clients)
    backend = _OwnSuperLink(
        folder,
        lambda link, mark: link.submit(app, {**run_config, "end-mark": str(mark)}, simulation),
        needs_clients=restarts > 0,
        ray_address=ray_address,
        start_timeout_s=start_timeout_s,
        commands=commands,
        on_output=on_output,
    )
    with _exit_on_signals():
        supervise(backend, restarts=restarts, say=on_restart)


class _OwnSuperLink(Backend):
    """Carries out each attempt on a new SuperLink, and watches its processes.

    Args:
        folder: The run's folder.
        submit: Submits the run with its end mark to a SuperLink, and returns Flower's id of it.
        needs_clients: Whether an attempt is over when the process of a client is gone.
        ray_address: The Ray cluster that runs the clients; empty for a new one.
        start_timeout_s: Seconds for the SuperLink to answer, and for the run to start.
        commands: Folder of Flower's commands, which is searched before PATH.
        on_output: Called with each line that the run prints.
    """

    def __init__(
        self,
        folder: RunFolder,
        submit: Callable[[SuperLink, Path], int],
        *,
        needs_clients: bool,
        ray_address: str,
        start_timeout_s: float,
        commands: Path,
        on_output: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._submit = submit
        self._needs_clients = needs_clients
        self._ray = {"RAY_ADDRESS": ray_address} if ray_address else {}
        self._start_timeout_s = start_timeout_s
        self._commands = commands
        self._on_output = on_output
        self._log_path = folder.path / "superlink.log"
        self._tail = Tail()

    @property
    def rounds(self) -> int:
        """The number of the last round in the run's folder."""
        return max((stats.round for stats in self._folder.rounds()), default=0)

    @property
    def resumes_from(self) -> str:
        """The round after the last checkpoint."""
        last = self._folder.last_saved_round
        return "from the beginning" if last is None else f"from round {last + 1}"

    @property
    def last_lines(self) -> str:
        """The last lines that the run printed."""
        return str(self._tail)

    def attempt(self) -> str:
        """Run the app on a new SuperLink until it ends or a process of it is gone."""
        port = _free_port()
        # Ray puts Unix sockets in it, whose paths have at most 103 bytes, and $TMPDIR may be long.
        with (
            TemporaryDirectory(prefix="fedsplit-", dir="/tmp", ignore_cleanup_errors=True) as name,
            _ended_with_this_process(home := Path(name)),
            closing(SuperLink.on_loopback(port)) as link,
            closing(LogFollower(link, self._take)) as log,
            _superlink(
                _environment(home, self._commands) | self._ray, port, self._log_path
            ) as process,
        ):
            try:
                gone = _SUPERLINK_GONE
                if _await_health(process, port, self._start_timeout_s, self._log_path):
                    run_id = self._submit(link, _end_mark(home))
                    log.start(run_id)
                    # It is needed even if it ends before the first look at the processes.
                    needed = {process.pid: ROLES["flower-superlink"]}
                    gone = self._watch(home, link, run_id, log, needed)
            except ConnectionLost:
                gone = _SUPERLINK_GONE
            if gone:
                # What is left has nothing to save, and would only delay the next attempt.
                end_all(home, gently=False)
            return gone

    def _take(self, line: str) -> None:
        self._tail.append(line)
        self._on_output(line)

    def _watch(
        self, home: Path, link: SuperLink, run_id: int, log: LogFollower, needed: dict[int, str]
    ) -> str:
        """Wait for the end of the run or of a process that it needs; return what is gone."""
        deadline = time.monotonic() + self._start_timeout_s
        has_started = False
        while True:
            is_over = log.ended_within(_POLL_S)
            alive = self._needed(home)
            gone = {needed[pid] for pid in needed.keys() - alive.keys()}
            needed |= alive
            # In this order, because a simulation ends Ray's processes after its ServerApp.
            if gone and not _end_mark(home).exists():
                # The others may have ended because of it.
                return f"{next(role for role in ROLES.values() if role in gone)} is gone"
            must_start = not has_started and time.monotonic() > deadline
            if not (is_over or gone or must_start):
                continue
            run = link.run(run_id)
            if run is None or run.is_over:
                log.ended_within(_LOG_S)
                return self._outcome(run)
            if must_start:
                self._require_started(run)
                has_started = True
            # It can no longer report the end of the run.
            if "the simulation" in gone:
                return "the simulation is gone"

    def _needed(self, home: Path) -> dict[int, str]:
        roles = roles_of(home)
        return {pid: role for pid, role in roles.items() if role != CLIENT or self._needs_clients}

    def _require_started(self, run: SubmittedRun) -> None:
        if run.state in WAITING:
            raise DeadlineExceeded(
                f"the run is still {run.state} after {self._start_timeout_s:g} s; see "
                f"{self._log_path}, or raise launch.start_timeout_s. The last lines of the run:\n"
                f"{self._tail}"
            )

    def _outcome(self, run: SubmittedRun | None) -> str:
        """Return "" for a completed run, and what is gone for one that did not end by itself."""
        if run is None:
            return _SUPERLINK_GONE
        if run.state == COMPLETED:
            return ""
        if "with exception" not in run.details:
            return f"the simulation is gone ({run.details})"
        raise Internal(
            f"the run did not complete: {run.state} ({run.details}); see the SuperLink's log "
            f"{self._log_path}. The last lines of the run:\n{self._tail}"
        )


def _end_mark(home: Path) -> Path:
    return home / "ended"


@contextmanager
def _ended_with_this_process(home: Path) -> Iterator[None]:
    """End the processes of a run, and remove its FLWR_HOME, even if this process is killed."""
    watcher = subprocess.Popen(
        [sys.executable, "-m", "fedsplit.flower.processes", str(home)],
        env={**os.environ, "PYTHONPATH": _module_path()},
        # A pipe, because the kernel closes it at any end of this process.
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        watcher.communicate()


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
def _superlink(
    env: Mapping[str, str], port: int, log_path: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a SuperLink inside the block."""
    home = Path(env["FLWR_HOME"])
    command = ["flower-superlink", "--insecure", "--simulation"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    try:
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                command,
                env=dict(env),
                cwd=home / "start",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A Ctrl-C of the terminal is for this process, which ends the others.
                start_new_session=True,
            )
    except FileNotFoundError as exc:
        raise ConfigError(
            f"launch=flwr needs the command {command[0]}, which is not there; "
            "pip install 'flwr[simulation]', or use launch=inline"
        ) from exc
    try:
        yield process
    finally:
        end_all(home)
        process.wait()


def _free_port() -> int:
    # Another process can take the port before the SuperLink does; then it ends with an error.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _await_health(
    process: "subprocess.Popen[bytes]", port: int, timeout_s: float, log_path: Path
) -> bool:
    """Wait for a SuperLink to answer; return False if it was killed."""
    deadline = time.monotonic() + timeout_s
    while not _answers(f"http://127.0.0.1:{port}/health"):
        if process.poll() is not None:
            if process.returncode < 0:
                return False
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
    return True


def _answers(url: str) -> bool:
    # Not `urlopen`, which asks the proxy of the environment.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=1.0):
            return True
    except (urllib.error.URLError, OSError):
        return False
