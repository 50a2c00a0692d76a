"""A Flower strategy around another one, which selects clients and averages their weights.

The clients that have work cannot get more, so the wrapped strategy selects among the others. Its
averages apply only where the policy of the run does not mix client weights by itself.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsplit.client.seal import added
from fedsplit.flower.records import ARRAYS, METRICS
from fedsplit.flower.sealed_arrays import record_of, sealed_of
from fedsplit.flower.strategy.aggregate import fedasync, fedbuff, with_discount, with_dtypes_of
from fedsplit.flower.strategy.coordinator import RoundCoordinator
from fedsplit.flower.strategy.nodes import GridView, seeded_sampling
from fedsplit.flower.strategy.noisy_mean import NoisyMean
from fedsplit.flower.strategy.round_policy import Share
from fedsplit.spec import RunSpec

log = logging.getLogger(__name__)


class WrappingStrategy(Strategy):
    """Selects clients and merges their replies with a wrapped strategy.

    Args:
        client_strategy: The wrapped strategy.
        run: The run.

    Attributes:
        coordinator: The coordinator of the rounds; it is there while they run.
        grid: Flower's grid, from the start of the rounds on.
    """

    coordinator: RoundCoordinator
    grid: Grid

    def __init__(self, client_strategy: Strategy, run: RunSpec) -> None:
        self.run = run
        self.client_strategy = client_strategy
        self._num_working = 0
        self._metrics: list[RecordDict] = []
        self._aggregated: MetricRecord | None = None

    @property
    def weights_epsilon(self) -> float:
        """The epsilon of the client weights of all rounds; 0 without an accountant."""
        return self.client_strategy.epsilon if isinstance(self.client_strategy, NoisyMean) else 0.0

    @property
    def is_budget_spent(self) -> bool:
        """Whether the client weights of another round would exceed the accountant's budget."""
        return isinstance(self.client_strategy, NoisyMean) and self.client_strategy.is_spent

    def count_releases_in(self, file: Path) -> None:
        """Let an accountant of the client weights count in a file of the run.

        Raises:
            DataError: The file is damaged.
        """
        if isinstance(self.client_strategy, NoisyMean):
            self.client_strategy.count_in(file)

    def after_merge(self, shares: Sequence[Share]) -> None:
        """Called after replies were merged with these shares; it does nothing by default."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the wrapped strategy select among the clients without work.

        The same seed and round select the same clients. In `async`, the number of clients that
        work at once is the number selected for a round that began without busy clients.
        """
        view = self._view(grid, self.coordinator.ready)
        with seeded_sampling(f"train/{self.run.seed}/{server_round}"):
            chosen = list(self.client_strategy.configure_train(server_round, arrays, config, view))
        busy = len(self.coordinator.rounds.busy)
        # With busy clients fewer nodes can be selected, so that number is not the right one.
        if not busy or self.run.policy.kind != "async":
            self._num_working = busy + len(chosen)
        return chosen[: self._num_working - busy]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the wrapped strategy aggregate the client weights."""
        return self.client_strategy.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the wrapped strategy select among the clients without work."""
        view = self._view(grid, self.coordinator.idle)
        with seeded_sampling(f"evaluate/{self.run.seed}/{server_round}"):
            return list(self.client_strategy.configure_evaluate(server_round, arrays, config, view))

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Let the wrapped strategy aggregate the metrics."""
        return self.client_strategy.aggregate_evaluate(server_round, replies)

    def _evaluate(
        self, number: int, arrays: ArrayRecord, config: ConfigRecord
    ) -> MetricRecord | None:
        """Measure held-out loss at the clients that the wrapped strategy selects."""
        messages = list(self.configure_evaluate(number, arrays, config, self.grid))
        replies = self.coordinator.evaluate(number, messages) if messages else []
        return self.aggregate_evaluate(number, replies) if replies else None

    def summary(self) -> None:
        """Log the run's settings."""
        run = self.run
        log.info("\tmodel %s, split %s, policy %s", run.model, run.split, run.policy.kind)
        log.info("\tClient weights (personal: %s):", run.client_weights.personal)
        self.client_strategy.summary()

    def _merge(
        self, replies: Sequence[tuple[Share, ArrayRecord, Message]], arrays: ArrayRecord
    ) -> ArrayRecord:
        """Merge replies, each with its share and the weights its client started from."""
        shares, policy = [share for share, _, _ in replies], self.run.policy
        records = [reply.content.metric_records[METRICS] for _, _, reply in replies]
        self._metrics += [RecordDict({METRICS: record}) for record in records]
        if not self.run.shares_client_weights:
            pass
        elif self.run.client_weights.sealed:
            found = [reply.content.array_records[ARRAYS] for _, _, reply in replies]
            arrays = record_of(added([sealed_of(each) for each in found]))
        elif policy.kind == "async":
            changes = [
                (started, reply.content.array_records[ARRAYS], policy.mixing * share.discount)
                for share, started, reply in replies
            ]
            rule = fedbuff if policy.buffer > 1 else fedasync
            arrays = rule(arrays, changes)
        else:
            discounted = [with_discount(reply, share.discount) for share, _, reply in replies]
            number = self.coordinator.rounds.round
            new, self._aggregated = self.aggregate_train(number, discounted)
            arrays = with_dtypes_of(new, arrays) if new is not None else arrays
        self.after_merge(shares)
        return arrays

    def _view(self, grid: Grid, nodes: Callable[[], dict[str, int]]) -> GridView:
        return GridView(grid, lambda: list(nodes().values()), self.run.launch.start_timeout_s)
