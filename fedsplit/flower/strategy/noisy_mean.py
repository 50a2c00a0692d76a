"""Flower's wrappers of differential privacy around the strategy for the client weights.

They clip each client's change of the weights and add noise to the mean, so that a reader of the
weights, such as another client, learns little of any one client. The server sees all of it.
"""

from collections.abc import Iterable, Mapping
from logging import INFO, WARNING
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
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

from fedsplit.config import build
from fedsplit.errors import ConfigError
from fedsplit.flower.strategy.aggregate import with_weight
from fedsplit.spec import RunSpec

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
        options = {"num_sampled_clients": run.clients, **run.client_weights.wrap_options}
        self._accountant = None
        if "accountant" in options:
            options["accountant"] = self._accountant = _accountant(options["accountant"], run)
        target = run.client_weights.wrap
        self.strategy: Strategy = build(target, Strategy, strategy=strategy, **options)
        if isinstance(self.strategy, _CLIPPING_AT_CLIENTS):
            raise ConfigError(
                f"client_weights.wrap={target} leaves the clipping to clients, and these do not "
                f"clip; use {target.replace('ClientSide', 'ServerSide')}"
            )
        self._noise = float(options["noise_multiplier"])
        self._sampled = int(options["num_sampled_clients"])
        self._clients = run.clients
        # The rounds that a checkpoint may be behind what has left the server.
        self._unsaved = max(1, run.train.save_every)
        self._releases = 0.0
        self._open_round = 0
        if self.is_spent:
            raise ConfigError(
                "client_weights.wrap_options.accountant.max_epsilon is too small for one round "
                f"with noise_multiplier={self._noise}; raise one of the two"
            )

    # --- accounting ---------------------------------------------------------------------------

    @property
    def epsilon(self) -> float:
        """What the releases so far have cost, at `target_delta`; 0 without an accountant."""
        accountant = self._accountant
        return accountant.get_privacy_spent().epsilon if accountant and self._releases else 0.0

    @property
    def is_spent(self) -> bool:
        """Whether another round would exceed the budget."""
        accountant = self._accountant
        if not accountant or accountant.config.max_epsilon is None:
            return False
        return accountant.would_exceed(self._release)

    def recount(self) -> None:
        """Count releases that the state of a checkpoint does not know of.

        A server that was killed may have sent the weights of rounds after its last checkpoint. They
        are trained anew with other noise, which is another release of the same data.
        """
        if not self._accountant:
            return
        least = int(self._releases) + self._unsaved
        if (unknown := least - self._accountant.num_releases) > 0:
            self._accountant.compose(self._release, unknown)
        self._releases = float(self._accountant.num_releases)

    @property
    def _release(self) -> GaussianPrivacyEvent:
        return GaussianPrivacyEvent(
            noise_multiplier=self._noise,
            sample_size=self._sampled,
            population_size=self._clients,
        )

    # --- Flower's strategy --------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the wrapper select clients.

        Raises:
            ConfigError: There are fewer than the noise is made for.
        """
        if self._open_round:
            # The round did not end. The accountant must forget it, and takes no replies as such.
            self.strategy.aggregate_train(self._open_round, [])
            self._open_round = 0
        connected = len(list(grid.get_node_ids()))
        if connected < self._sampled:
            raise ConfigError(
                f"the noise of client_weights.wrap is for {self._sampled} clients a round, and "
                f"{connected} can work in round {server_round}; start the others and resume"
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
            log(WARNING, "The client weights stay: %d of %d replied", len(found), self._sampled)
            return None, None
        new = self.strategy.aggregate_train(server_round, found)
        self._releases += 1
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
        log(INFO, "\tClient weights in %s:", type(self.strategy).__name__)
        self.strategy.summary()


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
