"""The client of a SuperLink's control API: submits runs of an app, and reads their state and log.

It does what `flwr run`, `flwr ls`, `flwr log` and `flwr stop` do, without a process for each.
"""

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from click import ClickException
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate
from flwr.cli.flower_config import read_superlink_connection
from flwr.cli.utils import AppPathDepthError, init_http_client_from_connection
from flwr.common.config import parse_config_args
from flwr.common.serde import fab_to_proto, user_config_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListRunsRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
)
from flwr.proto.run_pb2 import Run
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.utils import simulation_config_from_json

from fedsplit.errors import ConfigError, ConnectionLost

RunConfig = Mapping[str, str | int | float | bool]
COMPLETED = "finished:completed"
WAITING = ("pending", "starting")
"""States of a run that has not started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmittedRun:
    """A run as its SuperLink knows it.

    Attributes:
        id: Flower's id of the run, which is another one for each time that it is submitted.
        state: `pending`, `starting`, `running`, or `finished:` and how it ended.
        details: The SuperLink's reason for the end.
        config: The run config with which it was submitted.
    """

    id: int
    state: str
    details: str
    config: RunConfig

    @property
    def is_over(self) -> bool:
        """Whether the run has ended."""
        return self.state.startswith("finished")


class App:
    """A Flower app, packed once for all the times that it is submitted.

    Args:
        folder: The folder of its `pyproject.toml`.

    Raises:
        ConfigError: Flower refuses the app.
    """

    def __init__(self, folder: Path) -> None:
        try:
            # Flower uses what another library has deprecated.
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
                load_and_validate(folder.resolve() / "pyproject.toml")
                content = build_fab_from_disk(folder)
        except (ValueError, ClickException, AppPathDepthError, OSError) as exc:
            raise ConfigError(f"Flower refused the app in {folder}: {exc}") from exc
        self.fab = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))


class SuperLink:
    """A SuperLink that answers at an address.

    Every method raises ConnectionLost if it does not answer, and ConfigError if it refuses.

    Args:
        client: Flower's client of it.
        federation: The federation for new runs; "" for the default one.
    """

    def __init__(self, client: ControlHttpClient, federation: str = "") -> None:
        self._client = client
        self._federation = federation

    @staticmethod
    def on_loopback(port: int) -> "SuperLink":
        """Return the SuperLink at a port of this machine, without TLS."""
        client = ControlHttpClient.from_server_address(
            f"127.0.0.1:{port}",
            insecure=True,
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="fedsplit")],
        )
        # Otherwise it would be called through the proxy of the environment.
        client._client = httpx.Client(timeout=30.0, trust_env=False)
        return SuperLink(client)

    @staticmethod
    def named(name: str) -> "SuperLink":
        """Return a SuperLink of Flower's `config.toml`; "" for the default one.

        Raises:
            ConfigError: There is none of this name.
        """
        try:
            connection = read_superlink_connection(name or None)
            client = init_http_client_from_connection(connection)
        except ClickException as exc:
            raise ConfigError(f"the SuperLink {name} cannot be used: {exc.message}") from exc
        return SuperLink(client, connection.federation or "")

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def submit(
        self, app: App, config: RunConfig, simulation: Mapping[str, int] | None = None
    ) -> int:
        """Submit a run.

        Args:
            app: The app.
            config: Overrides of `[tool.flwr.app.config]`; a string may have newlines.
            simulation: Flower's settings of simulated clients, by name.

        Returns:
            Flower's id of the run.
        """
        request = StartRunRequest(
            fab=app.fab,
            override_config=user_config_to_proto(dict(config)),
            federation=self._federation,
            override_federation_config=simulation_config_from_json(dict(simulation))
            if simulation
            else None,
        )
        with _own_errors():
            response = self._client.StartRun(request)
        if not response.HasField("run_id"):
            raise ConfigError(f"the SuperLink refused the run: {response.note}")
        return response.run_id

    def runs(self) -> Sequence[SubmittedRun]:
        """Return the latest runs of this user, the newest first."""
        with _own_errors():
            response = self._client.ListRuns(ListRunsRequest(limit=1000))
        newest_first = sorted(
            response.run_dict.values(), key=lambda run: run.pending_at, reverse=True
        )
        return [_submitted(run) for run in newest_first]

    def run(self, run_id: int) -> SubmittedRun | None:
        """Return a run; None if the SuperLink does not know it, as after a restart without disk."""
        return next((run for run in self.runs() if run.id == run_id), None)

    def stop(self, run_id: int) -> None:
        """Stop a run that is not over; its messages are dropped."""
        with _own_errors():
            self._client.StopRun(StopRunRequest(run_id=run_id))

    def log(self, run_id: int, after: float = 0.0) -> Iterator[tuple[str, float]]:
        """Yield the log of a run until it ends, as pieces of text with their times.

        Args:
            run_id: Flower's id of the run.
            after: The time of the last piece that is known already.
        """
        request = StreamLogsRequest(run_id=run_id, after_timestamp=after)
        with _own_errors():
            for piece in self._client.StreamLogs(request):
                yield piece.log_output, piece.latest_timestamp


def read_config(option: str, words: Sequence[str]) -> RunConfig:
    """Return the values of an option: the name of a TOML file, or `key=value` words.

    Args:
        option: `--run-config` or `--node-config`, for the error.
        words: Its arguments.

    Raises:
        ConfigError: They cannot be read.
    """
    try:
        config: RunConfig = parse_config_args(list(words))
    except (ValueError, OSError, ClickException) as exc:
        raise ConfigError(f"{option} {' '.join(words)} cannot be read: {exc}") from exc
    return config


def _submitted(run: Run) -> SubmittedRun:
    status = run.status
    return SubmittedRun(
        id=run.run_id,
        state=f"{status.status}:{status.sub_status}" if status.sub_status else status.status,
        details=status.details,
        config=user_config_from_proto(run.override_config),
    )


@contextmanager
def _own_errors() -> Iterator[None]:
    """Convert the errors of Flower's client in the block.

    Raises:
        ConnectionLost: The SuperLink does not answer.
        ConfigError: It refuses the call.
    """
    try:
        yield
    except httpx.HTTPStatusError as exc:
        error = FlowerError.from_json(exc.response.text)
        if error is None and exc.response.is_server_error:
            raise ConnectionLost(f"the SuperLink cannot answer now: {exc}") from exc
        raise ConfigError(f"the SuperLink refused: {error.message if error else exc}") from exc
    # A frame that is cut off is a ValueError of Flower's client.
    except (httpx.HTTPError, ValueError) as exc:
        reason = str(exc) or type(exc).__name__
        raise ConnectionLost(f"the SuperLink does not answer: {reason}") from exc
