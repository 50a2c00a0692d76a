"""The base class of the strategies that train a split model: a Flower strategy that hosts a trunk.

A `SplitStrategy` wraps any Flower strategy, which selects clients and averages their weights
(bottom and top). Its loop is that of Flower's own `Strategy.start`, with these differences: the
policy of the run closes a round (`round_policy`), held-out loss is measured and training stopped
as `TrainSpec` says, and the trunk knows which clients have work (`coordinator`).
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from torch import Tensor

from fedsplit.client.objective import ClientObjective
from fedsplit.errors import Diverged
from fedsplit.flower.records import WEIGHT
from fedsplit.flower.strategy.client_states import ClientStates
from fedsplit.flower.strategy.coordinator import RoundCoordinator
from fedsplit.flower.strategy.divergence import DivergenceGuard
from fedsplit.flower.strategy.early_stopping import EarlyStopping
from fedsplit.flower.strategy.fit import require_fit
from fedsplit.flower.strategy.going_back import Repeats, Setback, newest_common
from fedsplit.flower.strategy.invitations import Invitations
from fedsplit.flower.strategy.nodes import NodeRegistry
from fedsplit.flower.strategy.recorder import Recorder
from fedsplit.flower.strategy.round_metrics import RoundMetrics
from fedsplit.flower.strategy.round_policy import Drain, RoundState
from fedsplit.flower.strategy.state import load_state_into, state_of, under
from fedsplit.flower.strategy.weight_guard import WeightGuard
from fedsplit.flower.strategy.wrapping import WrappingStrategy
from fedsplit.flower.trunk_server import TrunkServer
from fedsplit.model.stage import TrunkPart
from fedsplit.runs.folder import new_run_id
from fedsplit.spec import RunSpec
from fedsplit.spec.federation import POLICIES
from fedsplit.telemetry.round import RoundStats
from fedsplit.trunk.update import TrunkUpdate

log = logging.getLogger(__name__)

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
_CLIENT_STRATEGY, _GUARD = "client_weights/", "guard/"
_DIVERGENCE, _DONE = "divergence/", "done/"
"""The prefixes of the state of the strategy's parts in a checkpoint."""
_SLOWER = 0.5
"""The factor on the learning rate after training went back."""


class SplitStrategy(WrappingStrategy):
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
        recorder: Records every round.
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
        recorder: Recorder,
    ) -> None:
        super().__init__(client_strategy, run)
        # Check before anything starts, so that a run that is refused has no side effect.
        self.check()
        self._invitations = Invitations(run, tokenizer, labels)
        self.trunk_server = self.make_server(trunk)
        self._recorder = recorder
        self._first_rounds = RoundState()
        memory = run.clients * run.train.rounds
        self._guard = WeightGuard(run.guard, clients=run.clients, memory=memory)
        self._num_rounds = 0
        self._is_over = False
        self._early_stopping = EarlyStopping(run.train.patience)
        self._divergence = DivergenceGuard(run)
        self._states = ClientStates()
        self._repeats = Repeats(run.policy)
        self._fruitless: set[int] = set()
        self._went_back_from = 0

    # --- hooks --------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise an error for a run that does not fit the method.

        Raises:
            ConfigError: The run does not fit; the text names the setting and what to do.
        """
        self.client_objective.check(self.run)
        require_fit(
            type(self).__name__,
            self.run,
            self.client_strategy,
            policies=self.policies,
            averages_clients=self.averages_clients,
        )

    def make_server(self, trunk: TrunkPart) -> TrunkServer:
        """Return the server of the trunk."""
        return TrunkServer(trunk, self.run, self._invitations.preparation, update=self.update)

    def train(self, number: int, arrays: ArrayRecord, config: ConfigRecord) -> ArrayRecord:
        """Train a round, and return the client weights after it."""
        chosen = list(self.configure_train(number, arrays, config, self.grid))
        return self.coordinator.work(number, chosen, arrays, self.drain_of(number))

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
            evaluate_fn: Evaluates the client weights at the server, first before all rounds.
            first_round: The first round of a resumed run. It begins earlier if a client needs that.
            run_id: The run's id for the clients' checkpoints; by default a new one.

        Returns:
            The client weights after the last round, and the metrics of every round.

        Raises:
            CheckpointError: The clients cannot continue from any checkpoint of a resumed run.
            DeadlineExceeded: Too few clients connected in time.
            ModelMismatch: A client is configured for another run.
            Diverged: No client finished a round (see `RoundCoordinator.require_progress`), or
                training went back once and diverged again.
        """
        log.info("Starting %s:", type(self).__name__)
        self.summary()
        # Register clients first: a process that a simulation forks while gRPC starts would die.
        self._invitations.run_id = run_id or new_run_id()
        self._registry = NodeRegistry(grid, self.run, self._invitations, self._states.of)
        self._registry.register_all()
        self.grid, self._num_rounds, result = grid, num_rounds, Result(arrays=initial_arrays)
        saved = self._recorder.checkpoints
        if saved and (common := newest_common(saved, self._registry.states)) < first_round - 1:
            first_round, result.arrays = self._recorder.go_back(common)
        configs = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        _evaluate_at_server(evaluate_fn, first_round - 1, result)
        while True:
            self.coordinator = self._new_coordinator(timeout)
            if self.run.train.save_every and (self._went_back_from or first_round == 1):
                # The first one, or one from which a resumed run knows that it went back.
                self._recorder.save(first_round - 1)
            with self.trunk_server:
                log.info("Trunk is served at %s", self.trunk_server.address)
                setback = self._rounds(first_round, configs, evaluate_fn, result)
            if not setback:
                return result
            first_round = self._go_back(setback, result)

    # --- state --------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return the state of this strategy and of the wrapped one, by name.

        The work that clients have not finished is not part of it (`client_states`).
        """
        rounds, stopping = self.coordinator.rounds, self._early_stopping
        own = {"version": rounds.version, "sent": rounds.sent, "worse": stopping.worse}
        own |= {"over": int(self._is_over), "went_back_from": self._went_back_from}
        unmerged = {work.client for work in self.coordinator.unmerged}
        own |= {_DONE + client: 1 for client in sorted(self._states.done - unmerged)}
        parts = {
            _CLIENT_STRATEGY: state_of(self.client_strategy),
            _GUARD: self._guard.state(),
            _DIVERGENCE: self._divergence.state(),
        }
        return {
            **{name: torch.tensor(value) for name, value in own.items()},
            # float64 keeps the numbers exactly; torch's default is float32.
            "best": torch.tensor(stopping.best, dtype=torch.float64),
            "lr_scale": torch.tensor(self._invitations.lr_scale, dtype=torch.float64),
            **{prefix + n: tensor for prefix, part in parts.items() for n, tensor in part.items()},
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load what `state` returned, while the trunk is not served.

        Raises:
            CheckpointError: The state is another strategy's.
        """
        self._first_rounds = RoundState(version=int(state["version"]), sent=int(state["sent"]))
        self._early_stopping.best = float(state["best"])
        self._early_stopping.worse = int(state["worse"])
        self._is_over = bool(state["over"])
        self._went_back_from = int(state["went_back_from"])
        self._states.done = set(under(_DONE, state))
        load_state_into(self.client_strategy, under(_CLIENT_STRATEGY, state))
        self._guard.load_state(under(_GUARD, state))
        self._divergence.load_state(under(_DIVERGENCE, state))
        self._scale_lr(float(state["lr_scale"]))

    @property
    def client_states(self) -> Mapping[str, int]:
        """The ids of the clients' states that go with the server's."""
        return self._states.merged(self.coordinator.unmerged)

    @client_states.setter
    def client_states(self, states: Mapping[str, int]) -> None:
        self._states.go_back(states)

    # --- a round ------------------------------------------------------------------------------

    def drain_of(self, number: int) -> Drain:
        """Return the clients that a round waits for: all, if it may be the last one."""
        if number == self._num_rounds or self._early_stopping.may_stop():
            return Drain.ALL
        return Drain.NONE if number % self.run.train.evaluate_every else Drain.RETURNED

    def _rounds(
        self,
        first: int,
        configs: tuple[ConfigRecord, ConfigRecord],
        evaluate_fn: EvaluateFn | None,
        result: Result,
    ) -> Setback | None:
        """Run the rounds from `first` on; return why training must go back, if it must."""
        for number in range(first, self._num_rounds + 1):
            if self._is_over or self.is_budget_spent:  # a resumed run may have ended before
                break
            log.info("[ROUND %s/%s]", number, self._num_rounds)
            if setback := self._round(number, configs, result):
                return setback
            _evaluate_at_server(evaluate_fn, number, result)
        return None

    def _round(
        self, number: int, configs: tuple[ConfigRecord, ConfigRecord], result: Result
    ) -> Setback | None:
        """Run and record one round; return why training must go back, if it must."""
        coordinator, failure, engine = self.coordinator, None, self.trunk_server.service.engine
        waits = self.run.policy.missing == "wait"
        connected = self._registry.wait_for_all(coordinator.timeout_s) if waits else frozenset()
        # Before `catch_up`: late replies that arrive between two rounds count in the new round.
        coordinator.metrics = RoundMetrics(repeats=self._repeats.of(number), connected=connected)
        short_steps = engine.short_steps
        try:
            stats, is_last = self._train_and_evaluate(number, configs, result)
        except Diverged as exc:
            failure = exc
        short_steps = engine.short_steps - short_steps
        setback = self._repeats.setback_in(number, coordinator.metrics, short_steps)
        if setback and self._recorder.checkpoints:
            return setback
        if problem := self._divergence.problem_in(coordinator.metrics):
            reason = f"{problem} ({failure})" if failure else problem
            setback = Setback(round=number, reason=reason, diverged=True)
            if self._recorder.checkpoints:
                return setback
            log.warning("%s; there is no checkpoint to go back to (train.save_every)", setback)
        if failure:
            raise failure
        self._is_over = self._early_stopping.stops(stats) or is_last
        self._guard.end_round()
        self._went_back_from = 0
        self._recorder.on_round(stats, result.arrays, is_good=self._divergence.is_calm)
        coordinator.forget_departed()
        return None

    def _train_and_evaluate(
        self, number: int, configs: tuple[ConfigRecord, ConfigRecord], result: Result
    ) -> tuple[RoundStats, bool]:
        """Train a round and measure its held-out loss; return its record, and if it is the last."""
        coordinator, service = self.coordinator, self.trunk_server.service
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
        is_last = number == self._num_rounds or coordinator.is_done() or self.is_budget_spent
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
            went_back_from=self._went_back_from,
            weights_epsilon=self.weights_epsilon,
        )
        return stats, is_last

    def _go_back(self, setback: Setback, result: Result) -> int:
        """Continue from the last checkpoint, slower if training diverges; return the next round.

        Raises:
            Diverged: Training went back before. The result of the run is the last checkpoint's.
        """
        has_gone_back = self._invitations.lr_scale < 1
        # It refers to the old trunk service, whose optimizer would stay in memory.
        del self.coordinator
        self.trunk_server.renew()
        if setback.diverged and has_gone_back:
            # Served meanwhile, so that clients at work learn that their tokens are void.
            with self.trunk_server:
                outcome = self._recorder.end_diverged(str(setback))
            raise Diverged(
                f"{setback}; training went back before, to half the learning rate, so the run "
                f"ends; {outcome}; lower train.lr, or look at the data"
            )
        first, result.arrays = self._recorder.go_back(max(self._recorder.checkpoints))
        rate = ""
        if setback.diverged:
            self._scale_lr(_SLOWER)
            self._went_back_from, rate = setback.round, " at half the learning rate"
        log.warning("%s; training goes back to round %d%s", setback, first - 1, rate)
        return first

    def _scale_lr(self, factor: float) -> None:
        self._invitations.lr_scale = factor
        self.trunk_server.service.scale_lr(factor)

    def _new_coordinator(self, timeout_s: float | None) -> RoundCoordinator:
        return RoundCoordinator(
            grid=self.grid,
            registry=self._registry,
            run=self.run,
            trunk_server=self.trunk_server,
            add_join_info=self._add_join_info,
            merge=self._merge,
            states=self._states,
            fruitless=self._fruitless,
            guard=self._guard,
            rounds=self._first_rounds,
            timeout_s=timeout_s,
        )

    def _add_join_info(self, message: Message, client: str, number: int, next_state: int) -> None:
        saved = {states.get(client, 0) for states in self._recorder.checkpoints.values()}
        self._invitations.add_to(
            message,
            client,
            number,
            self.trunk_server,
            state=self._states.of(client),
            next_state=next_state,
            kept_states=saved | self._states.needed(client, self.coordinator.unmerged),
        )


def _evaluate_at_server(evaluate_fn: EvaluateFn | None, number: int, result: Result) -> None:
    if evaluate_fn and (metrics := evaluate_fn(number, result.arrays)) is not None:
        result.evaluate_metrics_serverapp[number] = metrics
