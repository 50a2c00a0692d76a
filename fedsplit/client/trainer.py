"""THE loop: step, fit and evaluate a client's model whose trunk is elsewhere.

A step reads: for each batch bottom, trunk, top, loss, backward; then both sides step. Labels and
token ids never leave; what crosses is the model's own business (`fedsplit.client.remote`).
"""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsplit.client.remote import RemoteTrunk
from fedsplit.data.batches import Batch
from fedsplit.errors import NonFinite, SessionLost, StaleVersion
from fedsplit.model.hollow import ClientPart
from fedsplit.model.lora import trainable
from fedsplit.optimization import PartOptimizer, clip_coefficient
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
    """Some steps: mean loss per token, tokens, and steps that were repeated or skipped."""

    loss: float
    num_tokens: int
    steps: int
    repeated: int
    skipped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalStats:
    """Held-out text: summed loss in nats, tokens, and the UTF-8 bytes they stand for."""

    nats: float
    num_tokens: int
    num_bytes: int


class ClientTrainer:
    """Trains a client's model together with its trunk.

    Args:
        model: The client's model, connected to `trunk`; what requires a gradient trains.
        trunk: The session with the trunk; `fit` and `evaluate` open it.
        run: The run: what the optimizers do, and the seed of dropout.
        step: How many optimizer steps this client has taken before.
    """

    def __init__(
        self, model: ClientPart, trunk: RemoteTrunk, run: RunSpec, *, step: int = 0
    ) -> None:
        self.optimizer = PartOptimizer(trainable(model), run.train)
        self.steps = step
        self._model = model
        self._trunk = trunk
        self._run = run

    def step(self, batches: Sequence[Batch]) -> StepStats:
        """One optimizer step at both sides, on the mean over all tokens of `batches`.

        Raises:
            StaleVersion: The trunk moved on meanwhile; nothing was changed here.
            NonFinite: A tensor held NaN or Inf; nothing was changed here.
        """
        num_tokens = sum(batch.num_tokens for batch in batches)
        self._model.train()
        self.optimizer.zero_grad()
        with self._trunk.turn.drawing(f"ends/{self._run.seed}/{self._trunk.client}/{self.steps}"):
            losses = [self._backward(batch, batch.num_tokens / num_tokens) for batch in batches]
        ends_sq_norm = self.optimizer.sq_norm()
        sq_norm = ends_sq_norm + self._trunk.trunk_sq_norm
        if not math.isfinite(sq_norm):
            raise NonFinite(f"the gradient of step {self.steps} has norm {sq_norm}; it was skipped")
        self._trunk.step(step=self.steps, num_tokens=num_tokens, ends_sq_norm=ends_sq_norm)
        self.optimizer.step(self.steps, clip_coefficient(sq_norm, self._run.train.clip_norm))
        self.steps += 1
        return StepStats(loss=sum(losses), num_tokens=num_tokens)

    def fit(self, batches: Iterable[Sequence[Batch]], *, round: int = 0) -> FitStats:
        """Train one step on each group of batches, in a session of its own.

        A step that the trunk could not take is repeated on the same batches with the same
        dropout; one whose numbers are not finite is skipped.

        Raises:
            NonFinite: Three steps in a row were not finite.
            FedsplitError: The trunk cannot be reached, or refuses for good.
        """
        done: list[StepStats] = []
        skipped = in_a_row = 0
        with self._trunk.session(round):
            for group in batches:
                try:
                    done.append(self._step_at_last(group, round))
                    in_a_row = 0
                except NonFinite as reason:
                    log.warning("%s skips a step: %s", self._trunk.client, reason)
                    skipped, in_a_row = skipped + 1, in_a_row + 1
                    if in_a_row == _ATTEMPTS:
                        raise
                    self._trunk.open(round, first_call=self._trunk.next_call)
        num_tokens = sum(stats.num_tokens for stats in done)
        nats = sum(stats.loss * stats.num_tokens for stats in done)
        return FitStats(
            loss=nats / max(1, num_tokens),
            num_tokens=num_tokens,
            steps=len(done),
            repeated=sum(stats.repeats for stats in done),
            skipped=skipped,
        )

    def evaluate(self, batches: Iterable[Batch], *, round: int = 0) -> EvalStats:
        """Loss on held-out batches; nothing is trained and no barrier waits for it."""
        nats, num_tokens, num_bytes = 0.0, 0, 0
        self._model.train(False)
        with self._trunk.session(round, training=False), torch.no_grad():
            for batch in batches:
                nats += self._loss(batch).item() * batch.num_tokens
                num_tokens += batch.num_tokens
                num_bytes += batch.num_bytes
        return EvalStats(nats=nats, num_tokens=num_tokens, num_bytes=num_bytes)

    def _step_at_last(self, group: Sequence[Batch], round: int) -> StepStats:
        first_call = self._trunk.next_call
        for repeats in range(_ATTEMPTS - 1):
            try:
                return replace(self.step(group), repeats=repeats)
            except (StaleVersion, SessionLost):
                self._trunk.open(round, first_call=first_call)
        return replace(self.step(group), repeats=_ATTEMPTS - 1)

    def _backward(self, batch: Batch, weight: float) -> float:
        loss = self._loss(batch) * weight
        loss.backward()
        return loss.item()

    def _loss(self, batch: Batch) -> Tensor:
        device = self._model.device
        loss: Tensor = self._model(
            input_ids=batch.ids_BT.to(device),
            attention_mask=batch.attention_mask_BT.to(device),
            labels=batch.labels_BT.to(device),
            use_cache=False,
        ).loss
        return loss
