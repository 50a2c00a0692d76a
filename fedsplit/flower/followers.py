"""The further trunk servers of a run: processes on the machine of the ServerApp, its followers.

`python -m fedsplit.flower.followers` is one of them. It reads a line of JSON from its standard
input, prints its address once it has the parameters of the leader, and ends with its input.
"""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

from fedsplit.config.schema import from_yaml, to_yaml
from fedsplit.console import LEVEL_VARIABLE, quiet_libraries
from fedsplit.errors import Internal
from fedsplit.flower.logs import show_logs
from fedsplit.flower.rank import command_of, shard_on
from fedsplit.flower.share import Preparation, tokenizer_of
from fedsplit.model.describe import config_of, trunk_of
from fedsplit.model.placement import devices_of, placed
from fedsplit.ranks.group import Ranks, ranks_of
from fedsplit.spec import RunSpec, WireSpec
from fedsplit.telemetry.context import working_on
from fedsplit.transport.client import GrpcLink
from fedsplit.transport.server import GrpcServer
from fedsplit.trunk.follower import FollowerService

log = logging.getLogger(__name__)

_PATIENCE_S = 10.0
"""Seconds for which no process may listen at the leader's address, before a follower ends."""
_END_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Following:
    """What a follower of a run needs: its name, the run, and how to reach the leader.

    `run` is YAML, `address` and `token` are those of the leader, and `preparation` is that of the
    run's clients.
    """

    name: str
    run: str
    address: str
    token: str
    tokenizer: str
    labels: tuple[str, ...]


class Followers:
    """The processes of a run's followers, which are started again when they end.

    Args:
        run: The run; its `launch.trunk_servers` counts the leader too.
        preparation: The tokenizer and classes of the run.
        is_alive: Returns whether the leader hears of a follower.
    """

    def __init__(
        self, run: RunSpec, preparation: Preparation, is_alive: Callable[[str], bool]
    ) -> None:
        self._run = run
        self._preparation = preparation
        self._is_alive = is_alive
        self._processes: list[_Process] = []

    def start(self, address: str, token: str) -> None:
        """Start all followers, and wait until they serve.

        Args:
            address: The leader's address.
            token: The token that the run's servers share.

        Raises:
            Internal: One has ended, or does not serve within `launch.start_timeout_s`.
        """
        for number in range(1, self._run.launch.trunk_servers):
            following = Following(
                name=f"server-{number}",
                run=to_yaml(self._run),
                address=address,
                token=token,
                tokenizer=self._preparation.tokenizer,
                labels=self._preparation.labels,
            )
            self._processes.append(_Process(following))
        for process in self._processes:
            process.await_start(self._run.launch.start_timeout_s)

    def addresses(self) -> list[str]:
        """Return the addresses of those that serve; those that have ended are started again."""
        found = []
        for place, process in enumerate(self._processes):
            if process.has_ended:
                log.warning("%s has ended (%s); it is started again", process.name, process.status)
                process.end()
                process.await_end()
                self._processes[place] = _Process(process.following)
            elif process.address and self._is_alive(process.name):
                found.append(process.address)
        return found

    def stop(self) -> None:
        """End all followers."""
        for process in self._processes:
            process.end()
        for process in self._processes:
            process.await_end()
        self._processes.clear()


class _Process:
    """The process of one follower; `address` is empty until it serves."""

    def __init__(self, following: Following) -> None:
        self.following = following
        self.name = following.name
        self.address = ""
        self._serves = threading.Event()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fedsplit.flower.followers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={LEVEL_VARIABLE: _level(), **os.environ},
        )
        threading.Thread(target=self._begin, name="fedsplit-follower", daemon=True).start()

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def status(self) -> str:
        return f"exit status {self._process.returncode}"

    def _begin(self) -> None:
        assert self._process.stdin and self._process.stdout
        try:
            print(json.dumps(asdict(self.following)), file=self._process.stdin, flush=True)
            self.address = self._process.stdout.readline().strip()
        except OSError:  # it has ended already
            pass
        self._serves.set()

    def await_start(self, timeout_s: float) -> None:
        self._serves.wait(timeout_s)
        if not self.address:
            raise Internal(
                f"{self.name} of launch.trunk_servers did not start within {timeout_s:g} s; its "
                "own lines above have the reason"
            )

    def end(self) -> None:
        assert self._process.stdin
        if not self.address:  # it does not read its input yet
            self._process.kill()
        try:
            self._process.stdin.close()
        except OSError:  # it has ended, with a part of its input unread
            pass

    def await_end(self) -> None:
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()


def _level() -> str:
    """Return the level of this process's log, which is that of its followers."""
    return "info" if log.isEnabledFor(logging.INFO) else "warning"


# --- the process of a follower --------------------------------------------------------------------


@contextmanager
def following(given: Following) -> Iterator[tuple[str, FollowerService]]:
    """A context that serves a follower of a run; gives its address and its service.

    Raises:
        FedsplitError: The leader refuses or cannot be reached, or the model cannot be built.
    """
    run = from_yaml(given.run)
    with ranks_of(run.launch.trunk_tp, command_of(run)) as ranks:
        service = _service(given, run, ranks)
        with service, _listening(run, given.name, service) as address:
            yield address, service


def _service(given: Following, run: RunSpec, ranks: Ranks | None) -> FollowerService:
    preparation = Preparation(tokenizer=given.tokenizer, labels=given.labels)
    config = config_of(run, tokenizer_of(run, preparation), given.labels)
    if ranks:
        trunk = shard_on(ranks, run, config, follows=True)
    else:
        device = run.launch.trunk_device
        trunk = placed(trunk_of(run, config, devices_of(device)[0]), device)
    # The leader's certificate is its own, unless an authority has signed it.
    trusted = replace(run.wire, tls_ca=run.wire.tls_ca or run.wire.tls_cert)

    def connect() -> GrpcLink:
        return GrpcLink(given.address, token=given.token, wire=trusted, patience_s=_PATIENCE_S)

    service = FollowerService(trunk, run, connect, given.token, name=given.name, channel=ranks)
    if ranks:
        ranks.lead(trunk, service.lose)
    return service


@contextmanager
def _listening(run: RunSpec, name: str, service: FollowerService) -> Iterator[str]:
    """A context in which a follower's clients can connect to it; gives its address."""
    server = GrpcServer(
        service,
        wire=wire_of(run.wire, name),
        limits=service.limits,
        max_clients=run.limits.streams_per_client * run.clients,
        budgets=run.limits,
    )
    try:
        bound = server.start()
        host = run.wire.advertise.rpartition(":")[0]
        yield f"{host}:{bound.rpartition(':')[2]}" if host else bound
    finally:
        server.stop()


def wire_of(wire: WireSpec, name: str) -> WireSpec:
    """Return the wire of a follower: it listens beside the leader.

    >>> wire_of(WireSpec(bind="unix:/tmp/trunk"), "server-1").bind
    'unix:/tmp/trunk.server-1'
    """
    if wire.bind.startswith("unix:"):
        return replace(wire, bind=f"{wire.bind}.{name}")
    return replace(wire, bind=f"{wire.bind.rpartition(':')[0]}:0")


def main() -> None:
    """Follow the leader of a run until the end of standard input."""
    show_logs()
    quiet_libraries()
    fields = json.loads(sys.stdin.readline())
    given = Following(**{**fields, "labels": tuple(fields["labels"])})
    over = threading.Event()
    with working_on(run=given.name), following(given) as (address, service):
        print(address, flush=True)

        def watch() -> None:
            sys.stdin.read()
            over.set()

        threading.Thread(target=watch, daemon=True).start()
        service.engine.ended.add_done_callback(lambda _: over.set())
        over.wait()


if __name__ == "__main__":
    main()
