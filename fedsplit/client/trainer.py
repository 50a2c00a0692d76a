"""The training loop: step, fit and evaluate a client's model whose trunk is elsewhere.

A step reads: for each batch bottom, trunk, top, loss, backward; then both sides step. Labels and
token ids never leave; what crosses is the model's own business (`fedsplit.client.remote`).
"""

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedsplit.client.footprint import Footprint
from fedsplit.client.objective import ClientObjective, Prediction
from fedsplit.client.proximal import ProximalTerm
from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.scaling import INITIAL_SCALE, LossScale
from fedsplit.client.unsplit import NoTrunk
from fedsplit.data.batches import Batch, micro_batches
from fedsplit.data.tasks import COUNTS, TASKS
from fedsplit.errors import NonFinite, SessionLost, StaleVersion
from fedsplit.model.acceleration import apply_training_options, autocast, precision_of
from fedsplit.model.lora import trainable
from fedsplit.optimization import PartOptimizer, clip_coefficient, unscale
from fedsplit.randomness import rng_scope
from fedsplit.spec import RunSpec

log = logging.getLogger(__name__)

_ATTEMPTS = 3
"""How often a step is tried, and how many batches in a row may be refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One optimizer step: mean loss in nats per token, and the tokens it is the mean of."""

    loss: float
    num_tokens: int
    repeats: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FitStats:
    """Some steps: their mean loss per token, their tokens, and what became of the others.

    `steps` were taken, with `repeated` attempts before; `refused` ones came too late for the trunk
    at every attempt, `skipped` ones were not finite. `peak_bytes` is what weights, gradients,
    moments and saved activations took together, measured in the first step.
    """

    loss: float
    num_tokens: int
    steps: int
    repeated: int
    refused: int
    skipped: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalStats:
    """Held-out data: summed loss in nats, tokens, and the UTF-8 bytes they stand for.

    `counts` are those of `fedsplit.data.tasks.COUNTS`; 0 for language models.
    """

    nats: float
    num_tokens: int
    num_bytes: int
    counts: Mapping[str, int]


class ClientTrainer:
    """Trains a client's model together with its trunk, or as `train.mode` says.

    Args:
        model: The client's model, connected to `trunk`, or an unsplit one; what requires a
            gradient trains.
        trunk: The session with the trunk, or what stands for none; `fit` and `evaluate` open it.
        run: The run: what the optimizers do, and the seed of dropout.
        step: How many optimizer steps this client has taken before.
        proximal_mu: Weight of FedProx's term, which pulls back to the values of now.
        shared: Names of the parameters that this term is for; all that train by default.
        loss_scale: Where it was after those steps; in use only while a side is in float16.
        objective: What is minimized; a strategy's is its `client_objective`.

    Raises:
        ConfigError: The run does not fit the objective; or the family cannot do what the run asks
            for.
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
        objective: type[ClientObjective] = ClientObjective,
    ) -> None:
        apply_training_options(model, run.train)
        trained = trainable(model)
        self.optimizer = PartOptimizer(trained, run.train)
        self.steps = step
        self.loss_scale = loss_scale
        self._model = model
        self._trunk = trunk
        self._run = run
        self._task = TASKS[run.task]
        self._objective = objective(model, run)
        pulled = [p for name, p in trained.items() if shared is None or name in shared]
        self._proximal = ProximalTerm(pulled, proximal_mu)
        self._footprint = Footprint(model, run.train.micro_batches)

    def step(self, batches: Sequence[Batch]) -> StepStats:
        """One optimizer step at both sides, on the mean over all tokens of `batches`.

        Raises:
            StaleVersion: The trunk moved on meanwhile; nothing was changed here.
            NonFinite: A tensor held NaN or Inf; nothing was changed here.
        """
        num_tokens = sum(batch.num_tokens for batch in batches)
        self._model.train()
        self.optimizer.zero_grad()
        loss = self._forward_backward(batches, num_tokens)
        client_sq_norm, sq_norm = self._sq_norms()
        self._step_trunk(num_tokens, client_sq_norm)
        self.optimizer.step(self.steps, self._clip_coefficient(client_sq_norm, sq_norm))
        self._count_step()
        return StepStats(loss=loss, num_tokens=num_tokens)

    def fit(self, batches: Iterable[Sequence[Batch]], *, round: int = 0) -> FitStats:
        """Train one step on each group of batches, in a session of its own.

        A step that the trunk could not take is repeated on the same batches with the same
        dropout; one that it refuses as stale again and again, and one whose numbers are not
        finite, is given up: it changes nothing at either side but the scale of the loss, if there
        is one.

        Raises:
            NonFinite: Three steps in a row were not finite, and no smaller scale could help.
            FedsplitError: The trunk cannot be reached, or refuses for good.
        """
        done: list[StepStats] = []
        refused = skipped = in_a_row = 0
        # An asynchronous round may see a client twice, which needs dropout of its own each time.
        per_batch = self._run.train.micro_batches
        first_call = self.steps * self._run.train.accumulation * per_batch
        with self._trunk.session(round, first_call=first_call):
            for group in batches:
                next_call = self._trunk.next_call + len(group) * per_batch
                try:
                    done.append(self._step_at_last(group, round))
                    in_a_row = 0
                    continue
                except StaleVersion as reason:
                    log.warning("%s gives a step up: %s", self._trunk.client, reason)
                    refused += 1
                except NonFinite as reason:
                    log.warning("%s skips a step: %s", self._trunk.client, reason)
                    skipped, in_a_row = skipped + 1, in_a_row + 1
                    if self._is_scaled and self.loss_scale.can_fall:
                        self.loss_scale, in_a_row = self.loss_scale.after_overflow(), 0
                        log.warning("the loss scale falls to %g", self.loss_scale.value)
                    elif in_a_row == _ATTEMPTS:
                        raise
                self._trunk.open(round, first_call=next_call)
        num_tokens = sum(stats.num_tokens for stats in done)
        nats = sum(stats.loss * stats.num_tokens for stats in done)
        return FitStats(
            loss=nats / max(1, num_tokens),
            num_tokens=num_tokens,
            steps=len(done),
            repeated=sum(stats.repeats for stats in done),
            refused=refused,
            skipped=skipped,
            peak_bytes=self._footprint.num_bytes,
        )

    def evaluate(self, batches: Iterable[Batch], *, round: int = 0) -> EvalStats:
        """Loss on held-out batches; nothing is trained and no barrier waits for it."""
        nats, num_tokens, num_bytes = 0.0, 0, 0
        counts = Counter(dict.fromkeys(COUNTS, 0))
        self._model.train(False)
        with self._trunk.session(round, training=False), torch.no_grad(), self._autocast():
            for batch in batches:
                prediction = self._evaluated(batch, round)
                nats += prediction.loss.item() * batch.num_tokens
                num_tokens += batch.num_tokens
                num_bytes += batch.num_bytes
                counts.update(self._task.counts(prediction.logits, batch.labels))
        return EvalStats(nats=nats, num_tokens=num_tokens, num_bytes=num_bytes, counts=counts)

    def _evaluated(self, batch: Batch, round: int) -> Prediction:
        try:
            return self._predict(batch)
        except SessionLost:
            self._trunk.open(round, training=False)
            return self._predict(batch)

    def _step_at_last(self, group: Sequence[Batch], round: int) -> StepStats:
        first_call = self._trunk.next_call
        for repeats in range(_ATTEMPTS - 1):
            try:
                return replace(self.step(group), repeats=repeats)
            except (StaleVersion, SessionLost):
                self._trunk.open(round, first_call=first_call)
        return replace(self.step(group), repeats=_ATTEMPTS - 1)

    # --- the parts of a step ------------------------------------------------------------------

    def _forward_backward(self, batches: Sequence[Batch], num_tokens: int) -> float:
        """Accumulate the gradients of all batches; the loss, a mean over all their tokens."""
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
        """Forward and backward of one batch; its share in the loss."""
        weight = batch.num_tokens / num_tokens
        with self._footprint.forward(), self._autocast(), self._trunk.examples(batch.examples_B):
            objective, loss = self._losses(batch)
        (objective * weight * self._scale).backward()
        return (loss * weight).item()

    def _sq_norms(self) -> tuple[float, float]:
        """The squared gradient norm of this client, and of client and trunk together."""
        unscale(self.optimizer.gradients(), self._scale)
        self._proximal.add_gradient()
        own = self.optimizer.sq_norm()
        both = own + self._trunk.trunk_sq_norm / self._scale**2
        if not math.isfinite(both):
            raise NonFinite(f"the gradient of step {self.steps} has norm {both}; it was skipped")
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
        train = self._run.train
        clipped = sq_norm if train.clip == "global" else client_sq_norm
        return clip_coefficient(clipped, train.clip_norm)

    def _count_step(self) -> None:
        self._footprint.stepped(self.optimizer)
        self.steps += 1
        if self._is_scaled:
            self.loss_scale = self.loss_scale.after_step()

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what is minimized, and the model's loss, which is reported."""
        # The prediction ends here, so that its logits take no memory during backward.
        prediction = self._predict(batch, self._run.train.label_smoothing)
        return self._objective.loss(prediction), prediction.loss.detach()

    def _predict(self, batch: Batch, smoothing: float = 0.0) -> Prediction:
        """Run the model's own forward, which makes the loss unless labels are smoothed."""
        device = self._model.device
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        labels = batch.labels.to(device)
        if smoothing == 0.0:
            output = self._model(**inputs, labels=labels)
            logits, loss = output.logits, output.loss
        else:
            logits = self._model(**inputs).logits
            loss = self._task.loss(logits, labels, smoothing)
        return Prediction(inputs=inputs, labels=labels, logits=logits, loss=loss)

    @property
    def _is_scaled(self) -> bool:
        """Whether gradients pass through float16, here or at the trunk."""
        ours = precision_of(self._run.model, self._model.device)
        return "float16" in (ours, self._trunk.autocast)

    @property
    def _scale(self) -> float:
        return self.loss_scale.value if self._is_scaled else 1.0

    def _autocast(self) -> AbstractContextManager[None]:
        return autocast(self._run.model, self._model.device)
