"""Options that save memory or time in training: checkpointing, half precision, compilation.

No option changes the function that a part computes. Activation checkpointing is exact; half
precision and compilation round differently.
"""

from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel

from fedsplit.errors import ConfigError
from fedsplit.model.compiling import compile_blocks
from fedsplit.model.stage import ClientPart, Part, TrunkPart
from fedsplit.randomness import draws
from fedsplit.spec import ModelSpec, TrainSpec


def apply_training_options(model: PreTrainedModel, train: TrainSpec) -> None:
    """Turn on the activation checkpointing and the compilation that `train` sets for a model.

    An unsplit model gets the options of both parts. If both set a compile mode, the client's is
    used.

    Args:
        model: A part or an unsplit model, with its adapters; changed in place.
        train: The options of client and trunk.

    Raises:
        ConfigError: The family does not support activation checkpointing.
    """
    if checkpoints(model, train):
        _checkpoint(model)
    if mode := _compile_mode(model, train):
        compile_blocks(model, mode)


def checkpoints(model: PreTrainedModel, train: TrainSpec) -> bool:
    """Whether activation checkpointing is on for this model already, or `train` turns it on.

    The model then keeps only the inputs of its blocks and recomputes the rest in the backward.
    """
    if isinstance(model, TrunkPart):
        is_set = train.checkpointing in ("trunk", "all")
    elif isinstance(model, ClientPart):
        is_set = train.checkpointing in ("client", "all")
    else:
        is_set = train.checkpointing != "none"
    return is_set or any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def autocast(model: ModelSpec, device: torch.device) -> AbstractContextManager[None]:
    """A context in which matrix products are computed in the precision of `model.autocast`.

    Use it for forwards only: autograd computes a backward in the precision of its forward.
    """
    return autocast_to(precision_of(model, device), device)


def autocast_to(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """A context like `autocast` for the name of a dtype; without autocast if it is empty."""
    dtype = getattr(torch, precision) if precision else None
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def precision_of(model: ModelSpec, device: torch.device) -> str:
    """The name of the dtype that `model.autocast` means on a device; empty if it is off.

    `auto` is bfloat16 if the device supports it, else float16. Only float16 needs a loss scale.
    """
    if model.autocast == "auto":
        return "bfloat16" if device.type == "cpu" or _has_bfloat16(device) else "float16"
    return "" if model.autocast == "off" else model.autocast


def _has_bfloat16(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        # By default torch also counts devices that only emulate bfloat16.
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _checkpoint(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"{type(model).__name__} does not support activation checkpointing; set "
            "train.checkpointing=none"
        )
    # A model without dropout draws nothing in the recomputation. Saving the state of the
    # generators would then only cost time, and it would touch state that all threads share.
    options = {"use_reentrant": False, "preserve_rng_state": draws(model)}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        # Older versions of transformers have only this name.
        model.gradient_checkpointing_enable(options)


def _compile_mode(model: PreTrainedModel, train: TrainSpec) -> str:
    # The order decides for an unsplit model, which takes the first mode that is not off.
    modes = [train.compile_client, train.compile_trunk]
    if isinstance(model, Part):
        modes = [train.compile_trunk if isinstance(model, TrunkPart) else train.compile_client]
    return next((mode for mode in modes if mode != "off"), "")
