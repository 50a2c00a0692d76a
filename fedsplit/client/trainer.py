"""The training loop of a client: step, fit and evaluate a model whose trunk is remote.

A step runs bottom, trunk, top, loss and backward for each batch; then both sides step. Labels and
token ids stay at the client. The model sends hidden states and gradients itself
(`fedsplit.client.remote`).
"""

import inspect
import logging
import math
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedsplit.client.footprint import Footprint
from fedsplit.client.norms import require_comparable_norms
from fedsplit.client.objective import ClientObjective, Prediction
from fedsplit.client.privacy import Shield
from fedsplit.client.progress import FitProgress
from fedsplit.client.proximal import ProximalTerm
from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.rollback import Rollback, StateStore
from fedsplit.client.scaling import INITIAL_SCALE, LossScale
from fedsplit.client.stats import EvalStats, FitStats, StepStats
from fedsplit.client.unsplit import NoTrunk
from fedsplit.data.batches import Batch, micro_batches
from fedsplit.data.tasks import COUNTS, TASKS
from fedsplit.errors import (
    FedsplitError,
    GradExploded,
    NonFinite,
    ServerRestarted,
    SessionLost,
    StaleVersion,
)
from fedsplit.model.acceleration import apply_training_options, autocast, precision_of
from fedsplit.model.lora import trainable
from fedsplit.optimization import PartOptimizer, clip_coefficient, unscale
from fedsplit.randomness import rng_scope
from fedsplit.spec import RunSpec
from fedsplit.telemetry.context import working_on
from fedsplit.telemetry.events import ClientStepTaken
from fedsplit.telemetry.sinks import SILENT, Telemetry
from fedsplit.telemetry.spans import span

log = logging.getLogger(__name__)

_ATTEMPTS = 3
"""The most attempts at one step, and the most steps in a row that may not be finite or refused."""


class ClientTrainer:
    """Trains a client's model together with its trunk, or as `train.mode` says.

    Args:
        model: The client's model, connected to `trunk`, or an unsplit model; the parameters that
            require a gradient are trained.
        trunk: The client's handle for the trunk, or `NoTrunk`; `fit` and `evaluate` open its
            session.
        run: The run; it configures the optimizers and seeds dropout.
        step: How many optimizer steps this client has taken before.
        proximal_mu: Weight of FedProx's term, which keeps parameters near their present values.
        shared: Names of the parameters that have this term; by default all that are trained.
        loss_scale: The loss scale after those steps; used only while a side computes in float16.
        lr_scale: The factor on the learning rate of this client.
        objective: The objective to minimize; that of a strategy is its `client_objective`.
        shield: What stands between the model and the trunk, if anything does; it learns of which
            texts a forward is.
        telemetry: Receives an event for each step of `fit`.

    Raises:
        ConfigError: The run does not fit the objective, or the family does not support an option of
            the run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trunk: RemoteTrunk | NoTrunk,
        run: RunSpec,
        *,
        step: int = 0,
        proximal_mu: float = 0.0,
        shared: Collection[str] | None = None,
        loss_scale: LossScale = INITIAL_SCALE,
        lr_scale: float = 1.0,
        objective: type[ClientObjective] = ClientObjective,
        shield: Shield | None = None,
        telemetry: Telemetry = SILENT,
    ) -> None:
        apply_training_options(model, run.train)
        trained = trainable(model)
        self.optimizer = PartOptimizer(trained, run.train)
        self.steps = step
        self.loss_scale = loss_scale
        self._lr_scale = lr_scale
        self._model = model
        self._trunk = trunk
        self._run = run
        self._task = TASKS[run.task]
        self._objective = objective(model, run)
        self._shield = shield
        self._telemetry = telemetry
        # Training needs no KV cache, which most families create by default.
        takes = inspect.signature(model.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in takes else {}
        pulled = [p for name, p in trained.items() if shared is None or name in shared]
        self._proximal = ProximalTerm(pulled, proximal_mu)
        self._footprint = Footprint(model, run.train.micro_batches)

    def step(self, batches: Sequence[Batch]) -> StepStats:
        """One optimizer step at both sides, on the mean over all tokens of `batches`.

        Raises:
            StaleVersion: The trunk has a newer version; no parameter of the client has changed.
            NonFinite: A tensor held NaN or Inf; no parameter of the client has changed.
            GradExploded: The trunk refused a far too large gradient, or reports one; as above.
        """
        return self._step(batches, None)

    def _step(self, batches: Sequence[Batch], rollback: Rollback | None) -> StepStats:
        num_tokens = sum(batch.num_tokens for batch in batches)
        self._model.train()
        self.optimizer.zero_grad()
        loss = self._forward_backward(batches, num_tokens)
        client_sq_norm, sq_norm = self._sq_norms()
        # The trunk first: if it refuses the step, the client has not changed yet.
        with rollback.saving() if rollback else nullcontext():
            self._step_trunk(num_tokens, client_sq_norm)
        coefficient = self._clip_coefficient(client_sq_norm, sq_norm)
        self.optimizer.step(self.steps, coefficient, self._lr_scale)
        self._count_step()
        return StepStats(loss=loss, num_tokens=num_tokens)

    def fit(
        self,
        batches: Iterable[Sequence[Batch]],
        *,
        round: int = 0,
        states: StateStore | None = None,
    ) -> FitStats:
        """Train one step on each group of batches, in a session of its own.

        A step that the trunk refuses as stale, or whose session it has lost, is repeated on the
        same batches with the same dropout. A step is given up after three attempts, or if its
        numbers are not finite. It then changes no parameter at either side; only the loss scale
        falls, if there is one.

        Args:
            batches: The groups; a sequence of them if there are `states`.
            round: The number of the round.
            states: Keeps the client's states. If the server is started again with an older version
                of the trunk, the client goes back to it, and repeats the groups from there on.

        Raises:
            NonFinite: Three steps in a row were not finite, and the loss scale cannot fall.
            GradExploded: Three steps in a row had a far too large gradient.
            ServerRestarted: The server was started again with an older version of the trunk, of
                which there is no state.
            FedsplitError: The trunk cannot be reached, or refuses with an error that is final.
        """
        # Calls are numbered by the steps of the whole run: a client may train twice in an
        # asynchronous round, and needs other dropout the second time.
        first_call = self.steps * self._run.train.accumulation * self._run.train.micro_batches
        progress = FitProgress()
        rollback = Rollback(self, self._trunk, self._run, states, batches) if states else None
        with self._trunk.session(round, first_call=first_call):
            groups = iter(batches)
            while (group := next(groups, None)) is not None:
                try:
                    with working_on(client=self._trunk.client, round=round, step=self.steps):
                        progress = self._fit_group(group, progress, round, rollback)
                except ServerRestarted as reason:
                    if not rollback:
                        raise
                    progress = rollback.go_back(reason, round)
                    groups = rollback.groups_from(progress.groups)
        return FitStats(
            loss=progress.nats / max(1, progress.num_tokens),
            num_tokens=progress.num_tokens,
            steps=progress.steps,
            repeated=progress.repeated,
            refused=progress.refused,
            skipped=progress.skipped,
            overflows=progress.overflows,
            peak_bytes=self._footprint.num_bytes,
        )

    def evaluate(self, batches: Iterable[Batch], *, round: int = 0) -> EvalStats:
        """Loss on held-out batches; nothing is trained and no barrier waits for it."""
        nats, num_tokens, num_bytes = 0.0, 0, 0
        counts = Counter(dict.fromkeys(COUNTS, 0))
        self._model.train(False)
        with self._trunk.session(round, training=False), torch.no_grad(), self._autocast():
            for batch in batches:
                prediction = self._predict_held_out(batch, round)
                nats += prediction.loss.item() * batch.num_tokens
                num_tokens += batch.num_tokens
                num_bytes += batch.num_bytes
                counts.update(self._task.counts(prediction.logits, batch.labels))
        return EvalStats(nats=nats, num_tokens=num_tokens, num_bytes=num_bytes, counts=counts)

    def _predict_held_out(self, batch: Batch, round: int) -> Prediction:
        try:
            with self._shielded(batch, batch.num_tokens):
                return self._predict(batch)
        except SessionLost:
            self._trunk.open(round, training=False)
            with self._shielded(batch, batch.num_tokens):
                return self._predict(batch)

    # --- the parts of a fit -------------------------------------------------------------------

    def _fit_group(
        self,
        group: Sequence[Batch],
        progress: FitProgress,
        round: int,
        rollback: Rollback | None,
    ) -> FitProgress:
        """Train a step on a group of batches; return the progress after it."""
        progress = progress.begin(self._trunk.next_call)
        next_call = progress.next_call + len(group) * self._run.train.micro_batches
        if rollback:
            rollback.progress = progress
        began = time.monotonic()
        try:
            with span(self._telemetry, "train_step"):
                stats = self._step_with_retries(group, round, rollback)
            self._report(group, stats, time.monotonic() - began)
            return progress.taken(stats.loss, stats.num_tokens, stats.repeats)
        except StaleVersion as reason:
            log.warning("%s gives up a step: %s", self._trunk.client, reason)
            progress = progress.given_up()
        except (NonFinite, GradExploded) as reason:
            log.warning("%s skips a step: %s", self._trunk.client, reason)
            progress = progress.left_out(is_overflow=self._lower_scale(reason))
            if progress.in_a_row == _ATTEMPTS:
                raise
        # Drops the gradients of the step from the trunk; the next step has its own calls.
        self._trunk.open(round, first_call=next_call)
        return progress

    def _report(self, group: Sequence[Batch], stats: StepStats, seconds: float) -> None:
        if self._telemetry:
            self._telemetry.emit(
                ClientStepTaken(
                    client=self._trunk.client,
                    seconds=seconds,
                    samples=sum(len(batch.labels) for batch in group),
                    tokens=stats.num_tokens,
                    loss=stats.loss,
                )
            )

    def _lower_scale(self, reason: FedsplitError) -> bool:
        """Lower the loss scale after an overflow; return False if it was none, or cannot fall."""
        is_overflow = isinstance(reason, NonFinite) and self._is_scaled
        if not (is_overflow and self.loss_scale.can_fall):
            return False
        self.loss_scale = self.loss_scale.after_overflow()
        log.warning("%s lowers the loss scale to %g", self._trunk.client, self.loss_scale.value)
        return True

    def _step_with_retries(
        self, group: Sequence[Batch], round: int, rollback: Rollback | None
    ) -> StepStats:
        first_call = self._trunk.next_call
        repeats = attempts = 0
        while True:
            instance = self._trunk.instance.id
            try:
                return replace(self._step(group, rollback), repeats=repeats)
            except (StaleVersion, SessionLost):
                attempts += 1
                if attempts == _ATTEMPTS:
                    raise
            self._trunk.open(round, first_call=first_call)
            repeats += 1
            # A server may be started again more often than a step is attempted.
            if self._trunk.instance.id != instance:
                attempts = 0

    # --- the parts of a step ------------------------------------------------------------------

    def _forward_backward(self, batches: Sequence[Batch], num_tokens: int) -> float:
        """Accumulate the gradients of all batches; return the mean loss over all their tokens."""
        # Seeded by the step, so that a repeated step has the same dropout.
        seed = f"ends/{self._run.seed}/{self._trunk.client}/{self.steps}"
        count = self._run.train.micro_batches
        if count == 1:
            with rng_scope(seed, needed=self._trunk.draws):
                return sum([self._one_batch(batch, num_tokens) for batch in batches])
        split = partial(micro_batches, number=count, num_predictions=self._task.num_predictions)
        pieces = [piece for batch in batches for piece in split(batch)]

        def work(number: int) -> float:
            with rng_scope(f"{seed}/{number}", needed=self._trunk.draws):
                return self._one_batch(pieces[number], num_tokens)

        return sum(self._trunk.run_pieces([partial(work, n) for n in range(len(pieces))]))

    def _one_batch(self, batch: Batch, num_tokens: int) -> float:
        """Forward and backward of one batch; return its share of the loss."""
        weight = batch.num_tokens / num_tokens
        of_batch = self._trunk.examples(batch.examples_B), self._shielded(batch, num_tokens)
        with self._footprint.forward(), self._autocast(), of_batch[0], of_batch[1]:
            objective, loss = self._losses(batch)
        (objective * weight * self._scale).backward()
        return (loss * weight).item()

    def _shielded(self, batch: Batch, num_tokens: int) -> AbstractContextManager[None]:
        if self._shield is None:
            return nullcontext()
        return self._shield.of(batch.inputs["input_ids"], self._scale / num_tokens)

    def _sq_norms(self) -> tuple[float, float]:
        """The squared gradient norm of this client, and of client and trunk together."""
        # The proximal term's gradient was not scaled, so it is added after unscaling.
        unscale(self.optimizer.gradients(), self._scale)
        self._proximal.add_gradient()
        own = self.optimizer.sq_norm()
        trunk = self._trunk.trunk_sq_norm / self._scale**2
        both = own + trunk
        if not math.isfinite(both):
            raise NonFinite(
                f"the squared gradient norm of step {self.steps} is {both}; the step was skipped"
            )
        if self._clips_together:
            require_comparable_norms(trunk, own, self.steps)
        return own, both

    def _step_trunk(self, num_tokens: int, client_sq_norm: float) -> None:
        if self._run.train.mode == "joint":
            self._trunk.step(
                step=self.steps,
                num_tokens=num_tokens,
                client_sq_norm=client_sq_norm,
                loss_scale=self._scale,
            )

    def _clip_coefficient(self, client_sq_norm: float, sq_norm: float) -> float:
        clipped = sq_norm if self._clips_together else client_sq_norm
        return clip_coefficient(clipped, self._run.train.clip_norm)

    def _count_step(self) -> None:
        self._footprint.stepped(self.optimizer)
        self.steps += 1
        if self._is_scaled:
            self.loss_scale = self.loss_scale.after_step()

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss to minimize, and the model's loss to report."""
        # The prediction is local to this method, so its logits take no memory during backward.
        prediction = self._predict(batch, self._run.train.label_smoothing)
        return self._objective.loss(prediction), prediction.loss.detach()

    def _predict(self, batch: Batch, smoothing: float = 0.0) -> Prediction:
        """Run the model's own forward; it computes the loss unless labels are smoothed."""
        device = self._model.device
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        labels = batch.labels.to(device)
        if smoothing == 0.0:
            output = self._model(**inputs, **self._options, labels=labels)
            logits, loss = output.logits, output.loss
        else:
            logits = self._model(**inputs, **self._options).logits
            loss = self._task.loss(logits, labels, smoothing)
        return Prediction(inputs=inputs, labels=labels, logits=logits, loss=loss)

    @property
    def _is_scaled(self) -> bool:
        """Whether gradients pass through float16, at the client or at the trunk."""
        own = precision_of(self._run.model, self._model.device)
        return "float16" in (own, self._trunk.autocast)

    @property
    def _clips_together(self) -> bool:
        """Whether the trunk's norm shortens the client's steps."""
        return self._run.train.clip == "global" and self._run.train.clip_norm > 0.0

    @property
    def _scale(self) -> float:
        return self.loss_scale.value if self._is_scaled else 1.0

    def _autocast(self) -> AbstractContextManager[None]:
        return autocast(self._run.model, self._model.device)
