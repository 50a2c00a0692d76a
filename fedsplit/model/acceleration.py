"""How a part trains in less memory or time: recomputed activations, half precision, compilation.

None of them changes what is computed: recomputation is exact, the other two round differently.
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
    """Have a model that is about to train do it as `train` says for its part.

    An unsplit model does what either part would do, the client first.

    Args:
        model: A part or an unsplit model, with its adapters.
        train: Names what is recomputed and what is compiled.

    Raises:
        ConfigError: The family cannot recompute its activations.
    """
    if checkpoints(model, train):
        _checkpoint(model)
    if mode := _compile_mode(model, train):
        compile_blocks(model, mode)


def checkpoints(model: PreTrainedModel, train: TrainSpec) -> bool:
    """Whether this part keeps only its blocks' inputs and computes the rest again in backward."""
    if isinstance(model, TrunkPart):
        return train.checkpointing in ("trunk", "all")
    if isinstance(model, ClientPart):
        return train.checkpointing in ("client", "all")
    return train.checkpointing != "none"


def autocast(model: ModelSpec, device: torch.device) -> AbstractContextManager[None]:
    """A block whose matrix products are in the precision of `model.autocast`.

    For forwards: a backward computes in the precision of its forward by itself.
    """
    precision = precision_of(model, device)
    dtype = getattr(torch, precision) if precision else None
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def precision_of(model: ModelSpec, device: torch.device) -> str:
    """The dtype that `model.autocast` stands for on a device, by name; empty if it is off.

    `auto` is bfloat16 where the device has it, which needs no loss scale, else float16.
    """
    if model.autocast == "auto":
        return "bfloat16" if device.type == "cpu" or _has_bfloat16(device) else "float16"
    return "" if model.autocast == "off" else model.autocast


def _has_bfloat16(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _checkpoint(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"{type(model).__name__} does not support activation checkpointing; set "
            "train.checkpointing=none"
        )
    # Without dropout there is nothing to draw again, and the process's generators are left alone.
    how = {"use_reentrant": False, "preserve_rng_state": draws(model)}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(how)
    else:  # as transformers called it before
        model.gradient_checkpointing_enable(how)


def _compile_mode(model: PreTrainedModel, train: TrainSpec) -> str:
    modes = [train.compile_client, train.compile_trunk]
    if isinstance(model, Part):
        modes = [train.compile_trunk if isinstance(model, TrunkPart) else train.compile_client]
    return next((mode for mode in modes if mode != "off"), "")
