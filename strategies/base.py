"""What all methods of split learning share: a Flower strategy that hosts the trunk.

A method is a `SplitStrategy`. It wraps any Flower strategy, which chooses clients and averages
their halves (bottom and top). Its loop is that of Flower's own `Strategy.start`, but a round closes
as the run's policy says (`strategies.rounds`), held-out loss is measured and training stopped as
`TrainSpec` says, and the trunk is told who is at work (`strategies.crew`).
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

from fedsplit.errors import ConfigError, Diverged
from fedsplit.flower.hosting import TrunkHost
from fedsplit.flower.records import ARRAYS, METRICS, WEIGHT, Ticket
from fedsplit.model.hollow import TrunkPart
from fedsplit.runs.metrics import RoundStats
from fedsplit.spec import RunSpec
from strategies.crew import Crew
from strategies.meeting import Choice, Meeting, drawing
from strategies.mixing import discounted, in_types_of, mixed, moved
from strategies.rounds import Drain, Rounds, Share
from strategies.tally import Tally
from strategies.wrapped import averages, memory_of, remember

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
_HALVES = "halves/"


class SplitStrategy(Strategy):
    """A method of split learning; a subclass says what is its own.

    `policies` are those that the method works with, `averages_halves` whether the wrapped strategy
    is what makes the new halves, and `replicas` whether each client has a trunk of its own.

    Args:
        halves: The wrapped strategy.
        trunk: The trunk part; it is served from `start` to its end, whatever happens.
        run: The run.
        tokenizer: A tokenizer as JSON for clients to use; empty if the model brings its own.
        labels: The classes of a classifier.
        on_round: Is told of every round that is over, with the halves as they are then.
    """

    policies: ClassVar[tuple[str, ...]] = ("sync", "quorum", "async")
    averages_halves: ClassVar[bool] = True
    replicas: ClassVar[bool] = False

    def __init__(
        self,
        *,
        halves: Strategy,
        trunk: TrunkPart,
        run: RunSpec,
        tokenizer: str,
        labels: tuple[str, ...],
        on_round: Callable[[RoundStats, ArrayRecord], None],
    ) -> None:
        self.run = run
        self.halves = halves
        self.check()
        self.host = self.make_host(trunk)
        self._tokenizer = tokenizer
        self._labels = labels
        self._on_round = on_round
        self._begin = Rounds()
        self._resumed = self._num_rounds = 0
        self._at_work = 0
        self._best, self._worse = math.inf, 0
        self._metrics: list[RecordDict] = []
        self._aggregated: MetricRecord | None = None

    # --- what a method may change -------------------------------------------------------------

    def check(self) -> None:
        """Refuse a run that does not fit the method.

        Raises:
            ConfigError: Names the setting and what to do.
        """
        name, policy, strategy = type(self).__name__, self.run.policy, type(self.halves).__name__
        if policy.kind not in self.policies:
            raise ConfigError(
                f"policy={policy.kind} does not go with {name}; use policy="
                f"{' or policy='.join(self.policies)}"
            )
        why = ""
        if policy.kind == "async":
            why = "policy=async mixes halves in by itself (policy.mixing, policy.buffer)"
        elif not self.averages_halves:
            why = f"{name} hands the halves from client to client"
        elif self.run.halves.personal == "both":
            why = "halves.personal=both leaves nothing to aggregate"
        if why and not averages(self.halves):
            raise ConfigError(
                f"{why}, so halves.strategy={strategy} would have no effect; use "
                "flwr.serverapp.strategy.FedAvg"
            )

    def make_host(self, trunk: TrunkPart) -> TrunkHost:
        """What serves the trunk."""
        return TrunkHost(trunk, self.run, replicas=self.replicas)

    def train(self, number: int, arrays: ArrayRecord, config: ConfigRecord) -> ArrayRecord:
        """Train a round; the halves after it."""
        chosen = list(self.configure_train(number, arrays, config, self.grid))
        return self.crew.work(number, chosen, arrays, self.drain_of(number))

    def merged(self, shares: Sequence[Share]) -> None:
        """Replies were merged with these shares."""

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
    ) -> Result:
        """Run all rounds with the trunk served; as Flower's `Strategy.start` beyond that.

        Args:
            grid: Flower's grid.
            initial_arrays: The halves to begin with.
            num_rounds: The last round.
            timeout: Real seconds that a round, and its evaluation, may take each; by default
                `policy.round_deadline_s`, if that is not in seconds of a virtual clock.
            train_config: Sent to the clients that train.
            evaluate_config: Sent to the clients that evaluate.
            evaluate_fn: Evaluates the halves at the server, before the first round and after each.
            first_round: Where a resumed run goes on.

        Returns:
            The halves after the last round, and the metrics of every round.

        Raises:
            DeadlineExceeded: Too few clients connected in time.
            ModelMismatch: A client is configured for another run.
            Diverged: No client finished a round.
        """
        log(INFO, "Starting %s:", type(self).__name__)
        self.summary()
        # Clients answer first: a process that a simulation forks while gRPC starts here would die.
        meeting = Meeting(grid, self.run, first_round - 1)
        meeting.begin()
        self.grid, self._resumed, self._num_rounds = grid, first_round - 1, num_rounds
        result = Result(arrays=initial_arrays)
        with self.host:
            log(INFO, "Trunk is served at %s", self.host.address)
            self.crew = self._crew(grid, meeting, timeout)
            configs = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
            _evaluate_at_server(evaluate_fn, first_round - 1, result)
            for number in range(first_round, num_rounds + 1):
                log(INFO, "[ROUND %s/%s]", number, num_rounds)
                goes_on = self._round(number, configs, result)
                _evaluate_at_server(evaluate_fn, number, result)
                if not goes_on:
                    break
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Have the wrapped strategy choose among the clients that are not at work.

        The same seed and round choose the same clients. In `async`, as many are at work at once
        as were chosen for a round in which nobody was.
        """
        choice = self._choice(grid, self.crew.ready)
        with drawing(f"train/{self.run.seed}/{server_round}"):
            chosen = list(self.halves.configure_train(server_round, arrays, config, choice))
        busy = len(self.crew.rounds.busy)
        if not busy or self.run.policy.kind != "async":
            self._at_work = busy + len(chosen)
        return chosen[: self._at_work - busy]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Have the wrapped strategy aggregate the halves."""
        return self.halves.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Have the wrapped strategy choose among the clients that are not at work."""
        choice = self._choice(grid, self.crew.idle)
        with drawing(f"evaluate/{self.run.seed}/{server_round}"):
            return list(self.halves.configure_evaluate(server_round, arrays, config, choice))

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Have the wrapped strategy aggregate the metrics."""
        return self.halves.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Say what is about to run."""
        run = self.run
        log(INFO, "\tmodel %s, split %s, policy %s", run.model, run.split, run.policy.kind)
        log(INFO, "\tHalves (personal: %s):", run.halves.personal)
        self.halves.summary()

    # --- what a resumed run goes on from ------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """What this and the wrapped strategy remember from round to round, by name.

        Nobody is at work at the end of a round in which a checkpoint is due (`Drain.ALL`), so that
        no half that is on its way is missing here.
        """
        rounds = self.crew.rounds
        own = {"version": rounds.version, "sent": rounds.sent, "worse": self._worse}
        return {
            **{name: torch.tensor(value) for name, value in own.items()},
            "best": torch.tensor(self._best, dtype=torch.float64),
            **{_HALVES + name: tensor for name, tensor in memory_of(self.halves).items()},
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over, before `start`, what `state` handed out.

        Raises:
            CheckpointError: It is another strategy's.
        """
        self._begin = Rounds(version=int(state["version"]), sent=int(state["sent"]))
        self._worse, self._best = int(state["worse"]), float(state["best"])
        halves = {name: tensor for name, tensor in state.items() if name.startswith(_HALVES)}
        remember(self.halves, {n.removeprefix(_HALVES): tensor for n, tensor in halves.items()})

    # --- a round ------------------------------------------------------------------------------

    def drain_of(self, number: int) -> Drain:
        """Who has to be back at the end of a round: all, where it may be the last or is kept."""
        train = self.run.train
        may_be_last = number == self._num_rounds or 0 < train.patience <= self._worse + 1
        if may_be_last or (train.save_every and number % train.save_every == 0):
            return Drain.ALL
        return Drain.NONE if number % train.evaluate_every else Drain.RETURNED

    def _round(
        self,
        number: int,
        configs: tuple[ConfigRecord, ConfigRecord],
        result: Result,
    ) -> bool:
        """One round, with its evaluation and its report; whether another one is to follow."""
        crew, service = self.crew, self.host.service
        crew.tally = Tally()
        self._metrics, self._aggregated = [], None
        begin, virtual_begin = time.monotonic(), service.now()
        arrays = self.train(number, crew.catch_up(result.arrays), configs[0])
        seconds, virtual_seconds = time.monotonic() - begin, service.now() - virtual_begin
        if not crew.tally.trained:
            raise Diverged(
                f"round {number}, training: none of {self._at_work} clients finished; the first "
                f"said: {next(iter(crew.tally.reasons), 'nothing before the deadline')}"
            )
        result.arrays = arrays
        if self._metrics and self._aggregated is None:
            self._aggregated = aggregate_metricrecords(self._metrics, WEIGHT)
        if self._aggregated is not None:
            result.train_metrics_clientapp[number] = self._aggregated
        is_last = number == self._num_rounds or crew.is_done()
        if is_last or number % self.run.train.evaluate_every == 0:
            metrics = self._evaluate(number, arrays, configs[1])
            if metrics is not None:
                result.evaluate_metrics_clientapp[number] = metrics
        stats = crew.tally.stats(
            self.run,
            number,
            seconds=seconds,
            virtual_seconds=virtual_seconds if self.run.policy.sim_slowdown else math.nan,
            version=service.engine.version,
        )
        stops = self._stops(stats)
        self._on_round(stats, arrays)
        return not (stops or is_last)

    def _crew(self, grid: Grid, meeting: Meeting, timeout_s: float | None) -> Crew:
        return Crew(
            grid=grid,
            meeting=meeting,
            run=self.run,
            host=self.host,
            give_ticket=self._give_ticket,
            merge=self._merge,
            rounds=self._begin,
            timeout_s=timeout_s,
        )

    def _merge(
        self, found: Sequence[tuple[Share, ArrayRecord, Message]], arrays: ArrayRecord
    ) -> ArrayRecord:
        """New halves, of replies with their shares and the halves that they began with."""
        shares, policy = [share for share, _, _ in found], self.run.policy
        records = [reply.content.metric_records[METRICS] for _, _, reply in found]
        self._metrics += [RecordDict({METRICS: record}) for record in records]
        if not self.run.shares_halves:
            pass
        elif policy.kind == "async":
            changes = [
                (began, reply.content.array_records[ARRAYS], policy.mixing * share.discount)
                for share, began, reply in found
            ]
            arrays = moved(arrays, changes) if policy.buffer > 1 else mixed(arrays, changes)
        else:
            replies = [discounted(reply, share.discount) for share, _, reply in found]
            new, self._aggregated = self.aggregate_train(self.crew.rounds.round, replies)
            arrays = in_types_of(new, arrays) if new is not None else arrays
        self.merged(shares)
        return arrays

    def _evaluate(
        self, number: int, arrays: ArrayRecord, config: ConfigRecord
    ) -> MetricRecord | None:
        """Held-out loss at the clients that the wrapped strategy chooses."""
        messages = list(self.configure_evaluate(number, arrays, config, self.grid))
        replies = self.crew.evaluate(number, messages) if messages else []
        return self.aggregate_evaluate(number, replies) if replies else None

    def _stops(self, stats: RoundStats) -> bool:
        """Whether held-out loss has not become better for too long."""
        patience = self.run.train.patience
        if math.isnan(stats.eval_loss):
            return False
        if stats.eval_loss < self._best:
            self._best, self._worse = stats.eval_loss, 0
        else:
            self._worse += 1
        if patience and self._worse >= patience:
            log(
                INFO,
                "Training stops after round %s: the best held-out loss, %.4f, is %s evaluations "
                "old (train.patience)",
                stats.round,
                self._best,
                self._worse,
            )
            return True
        return False

    def _choice(self, grid: Grid, among: Callable[[], dict[str, int]]) -> Choice:
        return Choice(grid, lambda: list(among().values()), self.run.launch.start_timeout_s)

    def _give_ticket(self, message: Message, client: str, number: int) -> None:
        ticket = Ticket(
            client=client,
            round=number,
            address=self.host.address,
            token=self.host.service.admit(client),
            config=self.run.fingerprint,
            tokenizer=self._tokenizer,
            labels=self._labels,
            resumed=self._resumed,
        )
        message.content = ticket.put_into(message.content)


def _evaluate_at_server(evaluate_fn: EvaluateFn | None, number: int, result: Result) -> None:
    metrics = evaluate_fn(number, result.arrays) if evaluate_fn else None
    if metrics is not None:
        result.evaluate_metrics_serverapp[number] = metrics
