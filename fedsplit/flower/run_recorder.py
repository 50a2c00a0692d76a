"""The server's records of a run: its rounds, checkpoints, best round and result."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from flwr.app import ArrayRecord
from torch import Tensor
from transformers import PreTrainedModel, TokenizersBackend

from fedsplit import atomic
from fedsplit.config import build, resolve_class, to_yaml
from fedsplit.data import Corpus
from fedsplit.errors import CheckpointError, ConfigError
from fedsplit.flower.server_weights import weights_of
from fedsplit.flower.trunk_server import TrunkServer
from fedsplit.model import SplitModel
from fedsplit.model.placement import placed
from fedsplit.runs.checkpoint import Checkpoint, checkpoints_in, facts_of, prune, remove_after
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.result import write_result
from fedsplit.spec import RunSpec
from fedsplit.telemetry.events import RunBegan
from fedsplit.telemetry.jsonl import MetricsLines
from fedsplit.telemetry.logs import RoundLog
from fedsplit.telemetry.outlets import Outlets
from fedsplit.telemetry.round import RoundStats
from fedsplit.telemetry.sinks import Sink

log = logging.getLogger(__name__)

_GROUPS = ("client_weights", "trunk", "strategy")


class Method(Protocol):
    """The part of a strategy that the recorder uses."""

    trunk_server: TrunkServer

    def state(self) -> dict[str, Tensor]:
        """Return the strategy's state from round to round, by name."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load what `state` returned."""
        ...

    def count_releases_in(self, file: Path) -> None:
        """Let an accountant of the client weights count in a file of the run."""
        ...

    @property
    def client_states(self) -> Mapping[str, int]:
        """The ids of the clients' states that go with the server's."""
        ...

    @client_states.setter
    def client_states(self, states: Mapping[str, int]) -> None: ...


class RunRecorder:
    """Writes a run's folder, and restores a run from it.

    Args:
        run: The run.
        corpus: The data of all clients.
        model: The client's part, or the unsplit model of a baseline, with initial weights.
        parts: Both parts of a split model; None for a baseline.
        tokenizer: The run's tokenizer; None for images.
        run_id: The id of a new run, or of one that a killed process began; "" for a new id.
        sinks: They get the events too, beside those of `launch.sinks`.

    Raises:
        ConfigError: `launch.sinks` names something that is no sink.
    """

    def __init__(
        self,
        run: RunSpec,
        corpus: Corpus,
        model: PreTrainedModel,
        parts: SplitModel | None,
        tokenizer: TokenizersBackend | None,
        run_id: str = "",
        sinks: Sequence[Sink] = (),
    ) -> None:
        self.first_round = 1
        self._checkpoints: dict[int, Mapping[str, int]] = {}
        self._run = run
        self._corpus = corpus
        self._weights = weights_of(model, run)
        self._model = model
        self._parts = parts
        self._tokenizer = tokenizer
        self._given_id = run_id
        self._sinks = sinks
        self._targets = [each.strip() for each in run.launch.sinks.split(",") if each.strip()]
        for target in self._targets:
            resolve_class(target, Sink)

    @property
    def run_id(self) -> str:
        """The run's id; a resumed run has the id that it had before."""
        return self._folder.id

    @property
    def arrays(self) -> ArrayRecord:
        """The current client weights, without personal ones."""
        return self._weights.arrays

    @contextmanager
    def recording(self, method: Method) -> Iterator[None]:
        """A context for the rounds, in a new folder or from the last checkpoint of a resumed run.

        Its end writes the result, unless an exception ends it.

        Raises:
            ConfigError: There is no run to resume, its settings or data differ, or another process
                still trains it.
            CheckpointError: The checkpoint is damaged.
        """
        self._method = method
        run = self._run
        outlets = Outlets(
            metrics=run.launch.metrics,
            traces=run.launch.traces,
            trace_share=run.launch.trace_share,
            certificate=run.wire.tls_cert,
            clients=run.client_names if run.launch.client_labels else (),
        )
        # First, because a run that is refused leaves no folder.
        with outlets.opened("server") as self._telemetry:
            resumed = RunFolder.to_resume(run)
            self._folder = resumed or RunFolder.begin(
                Path(run.launch.run_dir), run.name, to_yaml(run), self._given_id
            )
            with self._folder.held():
                self._begin(resumed)
                yield
                self._finish()

    def _begin(self, resumed: RunFolder | None) -> None:
        run, self._best = self._run, math.inf
        if resumed:
            # Again, since another process may have finished the run before it was locked here.
            resumed.require_resumable()
            self._resume(resumed)
        elif self._folder.rounds():
            # A killed process began the run, and wrote no checkpoint.
            self._folder.forget_after(0)
            remove_after(self._folder.best, 0)
        self._method.count_releases_in(self._folder.path / "releases.txt")
        log.info("Run %s: configuration %s, %s", run.name, run.fingerprint, self._folder.path)
        self._begin_telemetry()

    def _begin_telemetry(self) -> None:
        run, folder = self._run, self._folder
        lines = MetricsLines(
            folder.metrics, steps=run.launch.step_metrics, budget_s=run.wire.budget_s
        )
        others = [build(target, Sink, folder=folder.path) for target in self._targets]
        for sink in (lines, RoundLog(log), *others, *self._sinks):
            self._telemetry.add(sink)
        self._method.trunk_server.observe(self._telemetry)
        self._telemetry.emit(
            RunBegan(
                name=run.name,
                run_id=self.run_id,
                rounds=run.train.rounds,
                budget_bits=run.privacy.budget_bits,
                settings=run.settings,
            )
        )

    def on_round(self, stats: RoundStats, arrays: ArrayRecord, *, is_good: bool) -> None:
        """Record a round: its numbers, its checkpoint if one is due, and the best round.

        Args:
            stats: The numbers.
            arrays: The client weights after the round.
            is_good: Whether training may go back to the round, so that it is saved.
        """
        self._weights.arrays = arrays
        self._telemetry.emit(stats)
        train = self._run.train
        if stats.eval_loss < self._best:
            self._best = stats.eval_loss
            if train.load_best:
                self._write(self._folder.best, stats.round)
                # A resumed run needs the best round of those before its checkpoint.
                prune(
                    self._folder.best,
                    min(checkpoints_in(self._folder.checkpoints), default=stats.round),
                )
        if train.save_every and stats.round % train.save_every == 0 and is_good:
            self.save(stats.round)

    @property
    def checkpoints(self) -> Mapping[int, Mapping[str, int]]:
        """The ids of the clients' states that go with each checkpoint, by round, oldest first."""
        return self._checkpoints

    def save(self, number: int) -> None:
        """Write the checkpoint of a round.

        Raises:
            StorageError: A file cannot be written.
        """
        self._write(self._folder.checkpoints, number)
        prune(self._folder.checkpoints, number - self._run.train.save_every)
        self._checkpoints[number] = dict(self._method.client_states)
        kept = checkpoints_in(self._folder.checkpoints)
        self._checkpoints = {n: ids for n, ids in self._checkpoints.items() if n in kept}

    def go_back(self, number: int) -> tuple[int, ArrayRecord]:
        """Load the newest intact checkpoint of a round or before into trunk and strategy.

        Returns:
            The next round, and the client weights.

        Raises:
            CheckpointError: None is intact.
        """
        checkpoint = self._newest_intact(number)
        self._go_back_to(checkpoint)
        return checkpoint.round + 1, self.arrays

    def end_diverged(self, reason: str) -> str:
        """Write the result of a run that diverged: that of its last checkpoint, or the best round.

        Returns:
            What the result is.

        Raises:
            CheckpointError: It is damaged.
        """
        checkpoint = self._newest_intact()
        self._go_back_to(checkpoint)
        if not checkpoint.round:
            return "there is no model, because no round was good"
        self._finish(ended=reason)
        which = "the best round" if self._run.train.load_best else f"round {checkpoint.round}"
        return f"{self._folder.model} has the weights of {which}"

    def _finish(self, ended: str = "") -> None:
        """Write the result: the weights of the last round, or with `load_best` of the best one."""
        self._when_there_is_room(lambda: self._folder.set_divergence(ended))
        best = checkpoints_in(self._folder.best)
        if self._run.train.load_best and best:
            self._restore(self._read(best[max(best)]))
        if self._parts:
            self._method.trunk_server.collect()
            # Parts are joined on one device, and a trunk may be spread over several.
            placed(self._parts.trunk, "cpu")
        result = self._parts or self._model
        sealed = self._weights.tensors if self._run.client_weights.sealed else None
        self._when_there_is_room(
            lambda: write_result(
                self._folder, result, self._tokenizer, self._corpus, self._run, ended, sealed
            )
        )
        # Only now: until the result is complete, its best weights are in best/ alone.
        self._folder.tidy()
        # For whoever reads the log of a deployment.
        for line in self._folder.closing_table(with_text=False).splitlines():
            log.info("%s", line)
        log.info("Run %s is done: %s", self._run.name, self._folder.path)

    def _resume(self, folder: RunFolder) -> None:
        folder.tidy()
        checkpoint = self._newest_intact()
        if checkpoint.facts["corpus"] != self._corpus.sha256:
            raise ConfigError(
                f"{folder.path} was trained on data with sha256 {checkpoint.facts['corpus']}, but "
                f"{self._corpus.name} has {self._corpus.sha256} now; resume with the same data"
            )
        self._go_back_to(checkpoint)
        self.first_round = checkpoint.round + 1

    def _newest_intact(self, last: float = math.inf) -> Checkpoint:
        """Return the newest checkpoint up to a round that can be read; log those that cannot.

        Raises:
            CheckpointError: None can be read.
            ConfigError: It was written with other settings.
        """
        damage = CheckpointError(f"{self._folder.checkpoints} has no checkpoint")
        for number, path in reversed(checkpoints_in(self._folder.checkpoints).items()):
            if number > last:
                continue
            try:
                return self._read(path)
            except CheckpointError as exc:
                damage = exc
                log.warning("%s", exc)
        raise damage

    def _go_back_to(self, checkpoint: Checkpoint) -> None:
        self._restore(checkpoint)
        self._method.client_states = checkpoint.facts["states"]
        self._best = checkpoint.facts["best"]
        # Rounds after the checkpoint are trained again, so their records must not remain.
        self._when_there_is_room(lambda: self._folder.forget_after(checkpoint.round))
        remove_after(self._folder.best, checkpoint.round)
        remove_after(self._folder.checkpoints, checkpoint.round)
        # Again, since the process may have been killed before it did.
        prune(self._folder.checkpoints, checkpoint.round - self._run.train.save_every)
        self._checkpoints = {}
        for number, path in checkpoints_in(self._folder.checkpoints).items():
            with suppress(CheckpointError):  # an older one, which is not needed
                self._checkpoints[number] = facts_of(path, _GROUPS)["states"]

    def _write(self, parent: Path, number: int) -> None:
        checkpoint = Checkpoint(
            round=number,
            owner=self._owner,
            settings=self._run.settings,
            facts={
                "corpus": self._corpus.sha256,
                "best": self._best,
                "states": dict(self._method.client_states),
            },
            tensors={
                "client_weights": self._weights.tensors,
                "trunk": self._method.trunk_server.service.engine.state(),
                "strategy": self._method.state(),
            },
        )
        self._when_there_is_room(lambda: checkpoint.write(parent))

    def _when_there_is_room(self, write: Callable[[], object]) -> None:
        atomic.when_there_is_room(write, self._run.wire.budget_s)

    def _read(self, path: Path) -> Checkpoint:
        return Checkpoint.read(path, self._run, self._owner, _GROUPS)

    @property
    def _owner(self) -> str:
        return f"server/{self.run_id}"

    def _restore(self, checkpoint: Checkpoint) -> None:
        self._weights.tensors = checkpoint.tensors["client_weights"]
        self._method.trunk_server.service.engine.load_state(checkpoint.tensors["trunk"])
        self._method.load_state(checkpoint.tensors["strategy"])
