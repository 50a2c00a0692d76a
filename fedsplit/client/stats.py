"""What a client's steps and evaluations gave, in nats, tokens and counts."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One optimizer step: its mean loss in nats per token, its tokens, and its repetitions."""

    loss: float
    num_tokens: int
    repeats: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FitStats:
    """The steps of a call to `fit`: their mean loss in nats per token, their tokens, their number.

    `steps` counts the steps that were taken, `repeated` the attempts at them that failed before,
    `refused` the steps that were stale at every attempt, and `skipped` those with NaN or Inf and
    those whose gradient the trunk found far too large. `overflows` are those of them that lowered
    the loss scale, so that the next step can succeed.
    `peak_bytes` is the memory of weights, gradients, optimizer moments and saved activations
    together, measured in the first step.
    """

    loss: float
    num_tokens: int
    steps: int
    repeated: int
    refused: int
    skipped: int
    overflows: int
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
