"""The base class of the strategies that train a split model: a Flower strategy that hosts a trunk.

A `SplitStrategy` wraps any Flower strategy, which selects clients and averages their weights
(bottom and top). Its loop is that of Flower's own `Strategy.start`, with these differences: the
policy of the run closes a round (`round_policy`), held-out loss is measured and training stopped
as `TrainSpec` says, and the trunk knows which clients have work (`coordinator`).
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from logging import INFO
from typing import ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from torch import Tensor

from fedsplit.client.objective import ClientObjective
from fedsplit.errors import ConfigError
from fedsplit.flower.records import ARRAYS, METRICS, WEIGHT, Hello, JoinInfo
from fedsplit.flower.strategy.aggregate import fedasync, fedbuff, with_discount, with_dtypes_of
from fedsplit.flower.strategy.coordinator import RoundCoordinator
from fedsplit.flower.strategy.early_stopping import EarlyStopping
from fedsplit.flower.strategy.nodes import GridView, NodeRegistry, seeded_sampling
from fedsplit.flower.strategy.round_metrics import RoundMetrics
from fedsplit.flower.strategy.round_policy import Drain, RoundState, Share
from fedsplit.flower.strategy.state import load_state_into, only_averages, state_of
from fedsplit.flower.strategy.weight_guard import WeightGuard
from fedsplit.flower.trunk_server import TrunkServer
from fedsplit.model.stage import TrunkPart
from fedsplit.runs.folder import new_run_id
from fedsplit.runs.metrics import RoundStats
from fedsplit.spec import RunSpec
from fedsplit.spec.federation import POLICIES
from fedsplit.trunk.update import TrunkUpdate

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
_CLIENT_STRATEGY, _GUARD = "client_weights/", "guard/"
"""The prefixes of the wrapped strategy's state, and the guard's, in a checkpoint."""


class SplitStrategy(Strategy):
    """A method of split learning; a subclass overrides what the method changes.

    `policies` are the policies that the method works with. `averages_clients` says whether the
    wrapped strategy aggregates the client weights. `update` makes a step of the trunk from the
    clients' gradients. `client_objective` is what clients minimize; they read it from the class.

    Args:
        client_strategy: The wrapped Flower strategy, which selects clients and averages their
            weights.
        trunk: The trunk part; it is served while `start` runs.
        run: The run.
        tokenizer: A tokenizer as JSON for clients to use; empty if the model brings its own.
        labels: The classes of a classifier.
        on_round: Called after every round with its record and the client weights.
    """

    policies: ClassVar[tuple[str, ...]] = POLICIES
    averages_clients: ClassVar[bool] = True
    update: ClassVar[type[TrunkUpdate]] = TrunkUpdate
    client_objective: ClassVar[type[ClientObjective]] = ClientObjective

    def __init__(
        self,
        *,
        client_strategy: Strategy,
        trunk: TrunkPart,
        run: RunSpec,
        tokenizer: str,
        labels: tuple[str, ...],
        on_round: Callable[[RoundStats, ArrayRecord], None],
    ) -> None:
        self.run = run
        self.client_strategy = client_strategy
        # Check before anything starts, so that a run that is refused has no side effect.
        self.check()
        self.trunk_server = self.make_server(trunk)
        self._tokenizer = tokenizer
        self._labels = labels
        self._on_round = on_round
        self._first_rounds = RoundState()
        self._guard = WeightGuard(run.guard, memory=run.clients * run.train.rounds)
        self._num_rounds = 0
        self._is_over = False
        self._num_working = 0
        self._early_stopping = EarlyStopping(run.train.patience)
        self._metrics: list[RecordDict] = []
        self._aggregated: MetricRecord | None = None

    # --- hooks --------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise an error for a run that does not fit the method.

        Raises:
            ConfigError: The run does not fit; the text names the setting and what to do.
        """
        self.client_objective.check(self.run)
        name, policy = type(self).__name__, self.run.policy
        strategy = type(self.client_strategy).__name__
        if policy.kind not in self.policies:
            raise ConfigError(
                f"policy={policy.kind} does not go with {name}; use policy="
                f"{' or policy='.join(self.policies)}"
            )
        why = ""
        if policy.kind == "async":
            why = "policy=async mixes client weights by itself (policy.mixing, policy.buffer)"
        elif not self.averages_clients:
            why = f"{name} hands the client weights from client to client"
        elif self.run.client_weights.personal == "both":
            why = "client_weights.personal=both leaves nothing to aggregate"
        if why and not only_averages(self.client_strategy):
            raise ConfigError(
                f"{why}, so client_weights.strategy={strategy} would have no effect; use "
                "flwr.serverapp.strategy.FedAvg"
            )

    def make_server(self, trunk: TrunkPart) -> TrunkServer:
        """Return the server of the trunk."""
        return TrunkServer(trunk, self.run, update=self.update)

    def train(self, number: int, arrays: ArrayRecord, config: ConfigRecord) -> ArrayRecord:
        """Train a round, and return the client weights after it."""
        chosen = list(self.configure_train(number, arrays, config, self.grid))
        return self.coordinator.work(number, chosen, arrays, self.drain_of(number))

    def after_merge(self, shares: Sequence[Share]) -> None:
        """Called after replies were merged with these shares; it does nothing by default."""

    # --- Flower's strategy --------------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
        *,
        first_round: int = 1,
        run_id: str = "",
    ) -> Result:
        """Serve the trunk and run all rounds; otherwise as Flower's `Strategy.start`.

        Args:
            grid: Flower's grid.
            initial_arrays: The initial client weights.
            num_rounds: The last round.
            timeout: Real seconds that a round, and its evaluation, may take each; by default
                `policy.round_deadline_s`, if that is not in seconds of a virtual clock.
            train_config: Sent to the clients that train.
            evaluate_config: Sent to the clients that evaluate.
            evaluate_fn: Evaluates the client weights at the server, before the first round and
                after each round.
            first_round: The first round of a resumed run.
            run_id: The run's id, by which clients find their checkpoints; by default a new one.

        Returns:
            The client weights after the last round, and the metrics of every round.

        Raises:
            DeadlineExceeded: Too few clients connected in time.
            ModelMismatch: A client is configured for another run.
            Diverged: No client finished a round; see `RoundCoordinator.require_progress`.
        """
        log(INFO, "Starting %s:", type(self).__name__)
        self.summary()
        # Register clients first: a process that a simulation forks while gRPC starts would die.
        self._hello = self._hello_of(run_id or new_run_id(), resumed=first_round - 1)
        registry = NodeRegistry(grid, self.run, self._hello)
        registry.register_all()
        self.grid, self._num_rounds = grid, num_rounds
        result = Result(arrays=initial_arrays)
        with self.trunk_server:
            log(INFO, "Trunk is served at %s", self.trunk_server.address)
            self.coordinator = self._new_coordinator(grid, registry, timeout)
            configs = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
            _evaluate_at_server(evaluate_fn, first_round - 1, result)
            for number in range(first_round, num_rounds + 1):
                if self._is_over:  # a resumed run may have stopped early before it was killed
                    break
                log(INFO, "[ROUND %s/%s]", number, num_rounds)
                self._round(number, configs, result)
                _evaluate_at_server(evaluate_fn, number, result)
        return result

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

    def summary(self) -> None:
        """Log the run's settings."""
        run = self.run
        log(INFO, "\tmodel %s, split %s, policy %s", run.model, run.split, run.policy.kind)
        log(INFO, "\tClient weights (personal: %s):", run.client_weights.personal)
        self.client_strategy.summary()

    # --- state --------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return the state of this strategy and of the wrapped one, by name.

        At the end of a round with a checkpoint no client has work (`Drain.ALL`), so no client's
        weights are missing.
        """
        rounds = self.coordinator.rounds
        inner = state_of(self.client_strategy)
        own = {"version": rounds.version, "sent": rounds.sent, "worse": self._early_stopping.worse}
        own["over"] = int(self._is_over)
        return {
            **{name: torch.tensor(value) for name, value in own.items()},
            # float64 keeps the loss exactly; torch's default is float32.
            "best": torch.tensor(self._early_stopping.best, dtype=torch.float64),
            **{_CLIENT_STRATEGY + name: tensor for name, tensor in inner.items()},
            **{_GUARD + name: tensor for name, tensor in self._guard.state().items()},
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load, before `start`, what `state` returned.

        Raises:
            CheckpointError: The state is another strategy's.
        """
        self._first_rounds = RoundState(version=int(state["version"]), sent=int(state["sent"]))
        self._early_stopping.best = float(state["best"])
        self._early_stopping.worse = int(state["worse"])
        self._is_over = bool(state["over"])
        load_state_into(self.client_strategy, _under(_CLIENT_STRATEGY, state))
        self._guard.load_state(_under(_GUARD, state))

    # --- a round ------------------------------------------------------------------------------

    def drain_of(self, number: int) -> Drain:
        """Return the clients a round waits for: all, if it may be the last one or is saved."""
        train = self.run.train
        may_be_last = number == self._num_rounds or self._early_stopping.may_stop()
        if may_be_last or (train.save_every and number % train.save_every == 0):
            return Drain.ALL
        return Drain.NONE if number % train.evaluate_every else Drain.RETURNED

    def _round(
        self, number: int, configs: tuple[ConfigRecord, ConfigRecord], result: Result
    ) -> None:
        """Run one round with its evaluation and report."""
        coordinator, service = self.coordinator, self.trunk_server.service
        # Before `catch_up`: late replies that arrive between two rounds count in the new round.
        coordinator.metrics = RoundMetrics()
        self._metrics, self._aggregated = [], None
        begin, virtual_begin, short = time.monotonic(), service.now(), service.engine.short_steps
        guard_counts = service.engine.guard_counts
        arrays = self.train(number, coordinator.catch_up(result.arrays), configs[0])
        seconds, virtual_seconds = time.monotonic() - begin, service.now() - virtual_begin
        coordinator.require_progress(number)
        result.arrays = arrays
        if self._metrics and self._aggregated is None:
            self._aggregated = aggregate_metricrecords(self._metrics, WEIGHT)
        if self._aggregated is not None:
            result.train_metrics_clientapp[number] = self._aggregated
        # With train.max_steps all clients can be done before the last round.
        is_last = number == self._num_rounds or coordinator.is_done()
        if is_last or number % self.run.train.evaluate_every == 0:
            metrics = self._evaluate(number, arrays, configs[1])
            if metrics is not None:
                result.evaluate_metrics_clientapp[number] = metrics
        stats = coordinator.metrics.stats(
            self.run,
            number,
            seconds=seconds,
            virtual_seconds=virtual_seconds if self.run.policy.sim_slowdown else math.nan,
            version=service.engine.version,
            short_steps=service.engine.short_steps - short,
            guard_counts=service.engine.guard_counts - guard_counts,
        )
        self._is_over = self._early_stopping.stops(stats) or is_last
        self._guard.end_round()
        self._on_round(stats, arrays)
        coordinator.forget_departed()

    def _new_coordinator(
        self, grid: Grid, registry: NodeRegistry, timeout_s: float | None
    ) -> RoundCoordinator:
        return RoundCoordinator(
            grid=grid,
            registry=registry,
            run=self.run,
            trunk_server=self.trunk_server,
            add_join_info=self._add_join_info,
            merge=self._merge,
            guard=self._guard,
            rounds=self._first_rounds,
            timeout_s=timeout_s,
        )

    def _merge(
        self, replies: Sequence[tuple[Share, ArrayRecord, Message]], arrays: ArrayRecord
    ) -> ArrayRecord:
        """Merge replies, each with its share and the weights its client started from."""
        shares, policy = [share for share, _, _ in replies], self.run.policy
        records = [reply.content.metric_records[METRICS] for _, _, reply in replies]
        self._metrics += [RecordDict({METRICS: record}) for record in records]
        if not self.run.shares_client_weights:
            pass
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

    def _evaluate(
        self, number: int, arrays: ArrayRecord, config: ConfigRecord
    ) -> MetricRecord | None:
        """Measure held-out loss at the clients that the wrapped strategy selects."""
        messages = list(self.configure_evaluate(number, arrays, config, self.grid))
        replies = self.coordinator.evaluate(number, messages) if messages else []
        return self.aggregate_evaluate(number, replies) if replies else None

    def _view(self, grid: Grid, nodes: Callable[[], dict[str, int]]) -> GridView:
        return GridView(grid, lambda: list(nodes().values()), self.run.launch.start_timeout_s)

    def _hello_of(self, run_id: str, resumed: int) -> Hello:
        config, tokenizer, labels = self.run.fingerprint, self._tokenizer, self._labels
        return Hello(
            run_id=run_id, config=config, tokenizer=tokenizer, labels=labels, resumed=resumed
        )

    def _add_join_info(self, message: Message, client: str, number: int) -> None:
        join_info = JoinInfo(
            client=client,
            round=number,
            address=self.trunk_server.address,
            token=self.trunk_server.service.admit(client),
            config=self.run.fingerprint,
            tokenizer=self._tokenizer,
            labels=self._labels,
            run_id=self._hello.run_id,
            resumed=self._hello.resumed,
        )
        message.content = join_info.put_into(message.content)


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _evaluate_at_server(evaluate_fn: EvaluateFn | None, number: int, result: Result) -> None:
    metrics = evaluate_fn(number, result.arrays) if evaluate_fn else None
    if metrics is not None:
        result.evaluate_metrics_serverapp[number] = metrics
