"""Checks that refuse NaN, Inf, wrong dtypes and impossible counts before they reach a parameter."""

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fedsplit.data.tasks import TASKS
from fedsplit.errors import BadTensor, ProtocolError
from fedsplit.spec import RunSpec
from fedsplit.wire.finite import refuse_non_finite
from fedsplit.wire.messages import StepRequest

require_finite = partial(
    refuse_non_finite,
    advice="it was refused and nothing was changed; lower the learning rate or look at this batch",
)
"""Refuses a client's tensor that holds NaN or Inf; see `refuse_non_finite`."""


def require_dtype(name: str, dtype: torch.dtype, ours: torch.dtype) -> None:
    """Refuse a tensor whose dtype is not that of the trunk.

    Raises:
        BadTensor: It is not; the message has the name and both dtypes.
    """
    if dtype != ours:
        raise BadTensor(
            f"{name} is {dtype}, but this trunk computes in {ours}; set model.dtype alike at both "
            "sides"
        )


def require_like(grad_trunk_out_BTD: Tensor, trunk_out_BTD: Tensor) -> None:
    """Refuse a gradient whose shape is not that of the output.

    Raises:
        BadTensor: It is not; the message has both shapes.
    """
    if grad_trunk_out_BTD.shape != trunk_out_BTD.shape:
        raise BadTensor(
            f"grad_trunk_out of shape {tuple(grad_trunk_out_BTD.shape)} came for a trunk_out of "
            f"shape {tuple(trunk_out_BTD.shape)}; they must be the same"
        )


def require_plausible(request: StepRequest, num_positions: int, run: RunSpec) -> None:
    """Refuse a step whose counts or loss scale are impossible.

    Args:
        request: The step.
        num_positions: Sequences times tokens of all backwards since the last step.
        run: The run.

    Raises:
        ProtocolError: They are; the message has the value and its limit.
    """
    # An infinite loss scale would make every gradient 0.
    if not math.isfinite(request.loss_scale):
        raise ProtocolError(
            f"loss_scale={request.loss_scale} must be finite; send what the loss was multiplied by"
        )
    # Tokens are the client's weight: a larger count would outweigh all other clients.
    if request.num_tokens > num_positions:
        raise ProtocolError(
            f"num_tokens={request.num_tokens} for a step of {num_positions} positions; count the "
            "tokens of the batches that went through the trunk since the last step"
        )
    # Where no client waits for another, a fast client may take the steps of all.
    train, most = run.train, run.train.total_steps * run.clients
    # With `local_epochs` the number of steps depends on the clients' data, so it has no limit here.
    if request.step > most and (train.max_steps or not train.local_epochs):
        raise ProtocolError(
            f"step={request.step}, but the {run.clients} clients of this run take at most {most} "
            "steps together; count the optimizer steps of this client from 0"
        )


def counted(request: StepRequest, run: RunSpec) -> StepRequest:
    """Return a step with at most the tokens that a client of this run processes in a step.

    Tokens are the client's weight, and a client may send more backwards than the run asks for.
    """
    train = run.train
    # The first token of a sequence is not predicted, and a classifier makes one prediction a row.
    per_row = 1 if TASKS[run.task].pools else run.data.sequence_length - 1
    most = train.batch_size * train.accumulation * per_row
    return replace(request, num_tokens=min(request.num_tokens, most))
