"""Flower's wrappers of differential privacy around the strategy for the client weights.

They clip each client's change of the weights and add noise to the mean, so that a reader of the
weights, such as another client, learns little of any one client. The server sees all of it.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    Strategy,
)
from flwr.supercore.privacy_accounting import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    SamplingMethod,
)
from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant

from fedsplit import atomic
from fedsplit.config import build
from fedsplit.errors import ConfigError, DataError
from fedsplit.flower.strategy.aggregate import with_weight
from fedsplit.spec import RunSpec

log = logging.getLogger(__name__)

_OWN_OPTIONS = ("strategy", "num_sampled_clients")
"""The arguments of a wrapper that are no options."""
_CLIPPING_AT_CLIENTS = (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyClientSideAdaptiveClipping,
)


class NoisyMean(Strategy):
    """A strategy in one of Flower's wrappers, which `client_weights.wrap` names.

    All clients have the same weight, as the size of the noise assumes. A round in which one of them
    is missing changes nothing, because its noise would be too small.

    Args:
        strategy: The strategy that averages the client weights.
        run: The run. `client_weights.wrap_options` are the arguments of the wrapper; its
            `accountant` has `target_delta` and, for a budget, `max_epsilon`.

    Raises:
        ConfigError: The wrapper cannot be built, clips at the clients, needs dp-accounting, which
            is not installed, or its budget is too small for one round.
    """

    def __init__(self, strategy: Strategy, run: RunSpec) -> None:
        options = dict(run.client_weights.wrap_options)
        if found := [name for name in _OWN_OPTIONS if name in options]:
            raise ConfigError(
                f"client_weights.wrap_options.{found[0]} is no option: the strategy is "
                "client_weights.strategy, and its fraction_train decides the number of clients"
            )
        self._accountant = None
        if "accountant" in options:
            options["accountant"] = self._accountant = _accountant(options["accountant"], run)
        self._clients, self._sampled = run.clients, _sampled(strategy, run.clients)
        target = run.client_weights.wrap
        self.strategy: Strategy = build(
            target, Strategy, strategy=strategy, num_sampled_clients=self._sampled, **options
        )
        if isinstance(self.strategy, _CLIPPING_AT_CLIENTS):
            raise ConfigError(
                f"client_weights.wrap={target} leaves the clipping to clients, and these do not "
                f"clip; use {target.replace('ClientSide', 'ServerSide')}"
            )
        self._release = None
        if self._accountant:
            self._release = _release(options["noise_multiplier"], self._sampled, run.clients)
        self._file: Path | None = None
        self._open_round = 0
        if self.is_spent:
            raise ConfigError(
                "client_weights.wrap_options.accountant.max_epsilon is too small for one round "
                f"with noise_multiplier={options['noise_multiplier']}; raise one of the two"
            )

    # --- accounting ---------------------------------------------------------------------------

    def count_in(self, file: Path) -> None:
        """Count the releases of a run in a file, also those of a process that was killed.

        No checkpoint has the number: training that goes back to one takes no release back.

        Raises:
            DataError: The file has no number.
        """
        self._file = file
        text = file.read_text(encoding="utf-8", errors="replace").strip() if file.exists() else "0"
        if not text.isdecimal():
            raise DataError(f"{file} has no number of releases, but {text[:40]!r}")
        if self._accountant and self._release and int(text):
            self._accountant.compose(self._release, int(text))

    @property
    def epsilon(self) -> float:
        """What the releases so far have cost, at `target_delta`; 0 without an accountant."""
        accountant = self._accountant
        if not accountant or not accountant.num_releases:
            return 0.0
        return accountant.get_privacy_spent().epsilon

    @property
    def is_spent(self) -> bool:
        """Whether another round would exceed the budget."""
        accountant = self._accountant
        if not accountant or not self._release or accountant.config.max_epsilon is None:
            return False
        return accountant.would_exceed(self._release)

    # --- Flower's strategy --------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the wrapper select clients.

        Raises:
            ConfigError: Not all clients are there, of which the wrapper expects its share.
        """
        if self._open_round:
            # The round did not end. The accountant must forget it, and takes no replies as such.
            self.strategy.aggregate_train(self._open_round, [])
            self._open_round = 0
        connected = len(list(grid.get_node_ids()))
        if connected < self._clients:
            raise ConfigError(
                f"the noise of client_weights.wrap is for rounds with all {self._clients} clients, "
                f"and {connected} can work in round {server_round}; start the others and resume"
            )
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        self._open_round = server_round
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the wrapper clip, average and add noise; None if a client is missing."""
        found = [with_weight(reply, 1.0) for reply in replies]
        is_open, self._open_round = server_round == self._open_round, 0
        if not is_open or len(found) != self._sampled:
            if is_open:
                self.strategy.aggregate_train(server_round, [])
            log.warning("The client weights stay: %d of %d replied", len(found), self._sampled)
            return None, None
        try:
            new = self.strategy.aggregate_train(server_round, found)
        except ZeroDivisionError:  # Flower divides by the norm of a change, to clip it
            log.warning("The client weights stay: a client did not change them")
            return None, None
        if self._accountant and self._file:
            # Before they leave the server, which may be killed at any time.
            atomic.write_text(self._file, str(self._accountant.num_releases))
        return new

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Forward to the wrapper."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Forward to the wrapper."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Log the settings."""
        log.info("\tClient weights in %s:", type(self.strategy).__name__)
        self.strategy.summary()


def _sampled(strategy: Strategy, clients: int) -> int:
    """Return the number of clients that Flower's strategies select in each round."""
    fraction = float(getattr(strategy, "fraction_train", 1.0))
    return max(int(clients * fraction), int(getattr(strategy, "min_train_nodes", 1)))


def _release(noise: Any, sampled: int, clients: int) -> GaussianPrivacyEvent:
    try:
        return GaussianPrivacyEvent(
            noise_multiplier=noise, sample_size=sampled, population_size=clients
        )
    except (TypeError, ValueError) as exc:
        raise ConfigError(
            f"client_weights.wrap_options.noise_multiplier={noise!r} cannot be accounted: {exc}"
        ) from exc


def _accountant(options: Mapping[str, Any], run: RunSpec) -> RdpAccountant:
    try:
        config = PrivacyConfig(
            population_size=run.clients,
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
            sampling_method=SamplingMethod.NO_AMPLIFICATION,
            **options,
        )
        return RdpAccountant(config)
    except (TypeError, ValueError) as exc:
        raise ConfigError(
            f"client_weights.wrap_options.accountant={options!r} cannot be used: {exc}; give "
            "target_delta and, for a budget, max_epsilon"
        ) from exc
    except ImportError as exc:
        raise ConfigError(
            "client_weights.wrap_options.accountant needs the package dp-accounting; "
            "pip install 'fedsplit[dp]'"
        ) from exc
