"""The choice of the attention implementation that a part computes with."""

import torch
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from fedsplit.errors import ConfigError
from fedsplit.model.acceleration import precision_of
from fedsplit.spec import ModelSpec

# The fastest first: `auto` takes the first that has no obstacle.
_PREFERRED = ("flash_attention_2", "sdpa", "eager")


def attention_of(model: ModelSpec, family: type[PreTrainedModel], device: str = "cpu") -> str:
    """The attention implementation that `model.attention` means; `auto` is the fastest usable one.

    Args:
        model: The setting, and the precision of the computation.
        family: The model's class, which lists the implementations that it supports.
        device: The device of the part, as torch names it.

    Returns:
        The implementation's name in transformers.

    Raises:
        ConfigError: The implementation cannot be used; the message gives the reason.

    >>> from transformers import GPT2LMHeadModel
    >>> attention_of(ModelSpec(attention="auto"), GPT2LMHeadModel)
    'sdpa'
    """
    if model.attention == "auto":
        return next(name for name in _PREFERRED if not _obstacle(name, model, family, device))
    if obstacle := _obstacle(model.attention, model, family, device):
        raise ConfigError(
            f"model.attention={model.attention} cannot be: {obstacle}; model.attention=auto takes "
            "the fastest that can"
        )
    return model.attention


def _obstacle(name: str, model: ModelSpec, family: type[PreTrainedModel], device: str) -> str:
    """The reason why this implementation cannot be used; empty if it can."""
    # transformers has no public query for this; the flags are on the class, so no model is built.
    supported = {
        "flash_attention_2": family._supports_flash_attn,
        "sdpa": family._supports_sdpa,
        "eager": True,
    }
    if not supported[name]:
        return f"{family.__name__} does not support it"
    if name != "flash_attention_2":
        return ""
    if device.partition(":")[0] != "cuda":
        return f"it needs a CUDA device, and this part is on {device}"
    # The kernels of flash-attn exist for float16 and bfloat16 only.
    if model.dtype != "bfloat16" and not precision_of(model, torch.device(device)):
        return "it needs half precision (model.dtype=bfloat16 or model.autocast=auto)"
    return "" if is_flash_attn_2_available() else "the package flash-attn is not installed here"
