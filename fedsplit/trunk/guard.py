"""What is refused before it can reach a parameter: NaN, Inf and counts that cannot be, by name."""

import math

import torch
from torch import Tensor

from fedsplit.errors import BadTensor, ModelMismatch, NonFinite, ProtocolError
from fedsplit.spec import RunSpec
from fedsplit.wire.messages import StepRequest


def require_finite(tensor: Tensor, name: str) -> None:
    """Refuse a tensor that holds NaN or Inf.

    The sum is the cheap first look: it is finite for all but overflowing sums of finite entries.

    Raises:
        NonFinite: Names the tensor and how many entries are not finite.
    """
    if math.isfinite(tensor.sum().item()):
        return
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise NonFinite(
            f"{name} holds {bad} of {tensor.numel()} values that are NaN or Inf; it was refused "
            "and nothing was changed; lower the learning rate or look at this batch"
        )


def require_dtype(name: str, dtype: torch.dtype, ours: torch.dtype) -> None:
    """Refuse a tensor of another dtype than the trunk computes in.

    Raises:
        BadTensor: Names the tensor and both dtypes.
    """
    if dtype != ours:
        raise BadTensor(
            f"{name} is {dtype}, but this trunk computes in {ours}; set model.dtype alike at both "
            "sides"
        )


def require_same(what: str, theirs: object, ours: object) -> None:
    """Refuse a client that was started from something else than the trunk.

    Raises:
        ModelMismatch: Names both sides' values.
    """
    if theirs != ours:
        raise ModelMismatch(
            f"{what}: the client has {theirs}, the trunk {ours}; start both from the same model, "
            "split and configuration"
        )


def require_like(grad_trunk_out_BTD: Tensor, trunk_out_BTD: Tensor) -> None:
    """Refuse a gradient that is not of the output's shape.

    Raises:
        BadTensor: It is not.
    """
    if grad_trunk_out_BTD.shape != trunk_out_BTD.shape:
        raise BadTensor(
            f"grad_trunk_out of shape {tuple(grad_trunk_out_BTD.shape)} came for a trunk_out of "
            f"shape {tuple(trunk_out_BTD.shape)}; they must be the same"
        )


def require_plausible(request: StepRequest, num_positions: int, run: RunSpec) -> None:
    """Refuse a step whose counts or whose loss scale cannot be.

    More tokens than were sent for it would be a weight over all others, and more steps than there
    are a place in the schedule that pulls the others' after it. Where no client waits for another,
    a fast one may take the steps of all. How many steps `train.local_epochs` are, only the data
    tell. An infinite loss scale would make every gradient 0.

    Args:
        request: The step.
        num_positions: Sequences times tokens of all backwards since the last step.
        run: The run.

    Raises:
        ProtocolError: Names the value, and what it may be.
    """
    if not math.isfinite(request.loss_scale):
        raise ProtocolError(
            f"loss_scale={request.loss_scale} must be finite; send what the loss was multiplied by"
        )
    if request.num_tokens > num_positions:
        raise ProtocolError(
            f"num_tokens={request.num_tokens} for a step of {num_positions} positions; count the "
            "tokens of the batches that went through the trunk since the last step"
        )
    train, most = run.train, run.train.total_steps * run.clients
    if request.step > most and (train.max_steps or not train.local_epochs):
        raise ProtocolError(
            f"step={request.step}, but the {run.clients} clients of this run take at most {most} "
            "steps together; count the optimizer steps of this client from 0"
        )
