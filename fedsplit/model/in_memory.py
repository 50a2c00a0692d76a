"""A model in memory that is to be split: its config, its tensors and its identity."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from fedsplit.errors import UnsupportedModel
from fedsplit.model.checkpoint_names import compared_parameters
from fedsplit.model.identity import (
    MEMORY,
    VALUES,
    tensors_digest,
    values_digest,
    values_in_memory,
)
from fedsplit.model.quantization import (
    METHOD,
    quantization_of,
    quantized_layers,
    without_quantization,
)
from fedsplit.model.source import on_meta

# Dtypes of weights that are not quantized.
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def in_memory(
    model: object, model_class: type[PreTrainedModel] | None
) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The config of a model in memory, and the arguments of the builders for it.

    Raises:
        UnsupportedModel: It is not a model of transformers, or its weights are quantized.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(
            f"split_model takes a model of transformers, not a {type(model).__name__}; for a model "
            "of peft, pass model.merge_and_unload(), or split its base model and load the adapter "
            "into the parts"
        )
    config = _config_of(model)
    return config, {
        # The builders use tensors without a copy, and training must not change the caller's model.
        "state_dict": {name: _copy_of(tensor) for name, tensor in model.state_dict().items()},
        "model_class": model_class or type(model),
        "dtype": model.dtype,
        "attn_implementation": _attention(config),
    }


def identity_of(model: PreTrainedModel, head: Sequence[str]) -> dict[str, str]:
    """The digests of a model in memory, by kind; none of a model on the meta device."""
    digest = tensors_digest(model.state_dict())
    if not digest:
        return {}
    parameters = compared_parameters(model, head).items()
    values = ((name, p.shape, values_in_memory(p)) for name, p in parameters)
    return {MEMORY: digest, VALUES: values_digest(values)}


def _copy_of(tensor: Tensor) -> Tensor:
    # A quantized weight is of a class whose methods read what is not in a state dict.
    return tensor.detach().as_subclass(Tensor).clone()


def _config_of(model: PreTrainedModel) -> PretrainedConfig:
    """A model's config, without a quantization that its weights no longer have.

    transformers dequantizes most GGUF files while it reads them, but leaves the quantization in
    the config. It would then load the parts as quantized models.

    Raises:
        UnsupportedModel: The weights are quantized by a method that parts do not have.
    """
    method = quantization_of(model.config)
    if not method or (method == METHOD and any(quantized_layers(model))):
        return model.config
    config = without_quantization(model.config)
    plain = on_meta(type(model), copy.deepcopy(config)).state_dict()
    for name, tensor in model.state_dict().items():
        expected = plain.get(name)
        # Quantized layers pack several values into an integer, or add tensors for their scales.
        if expected is None or tensor.shape != expected.shape or tensor.dtype not in _PLAIN:
            raise UnsupportedModel(
                f"{type(model).__name__}: its weights are quantized ({method}): '{name}' is "
                f"{tensor.dtype} of shape {tuple(tensor.shape)}; dequantize the model before it "
                "is split, such as with model.dequantize()"
            )
    return config


def _attention(config: PretrainedConfig) -> str | None:
    name: str | None = config._attn_implementation
    return name
