"""Quantized weights: frozen layers in 4 or 8 bits, by transformers' quantizer for bitsandbytes.

A part quantizes the layers that the unsplit model would, and adapters train on top of them.
(NF4: Dettmers et al. 2023, "QLoRA", arXiv 2305.14314. int8: Dettmers et al. 2022, "LLM.int8()",
arXiv 2208.07339.)
"""

import copy
import importlib.util
import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from fedsplit.errors import CheckpointError, ConfigError, UnsupportedModel

METHOD = "bitsandbytes"
"""The method of quantization that parts have; it is a package, and the extra `quantize`."""

OPTION = "quantization_config"
"""The option of `from_pretrained`, and the field of a config, that has the settings."""

_REFUSED = (
    "its weights are quantized ({method}), and fedsplit reads plain weights and those of "
    f"{METHOD}; load the model with dequantized weights, save it, and use that"
)
_FOUR_BITS, _EIGHT_BITS = "Params4bit", "Int8Params"
# What a file has beside a quantized weight, after the name of the weight or of its layer.
_STATISTICS = re.compile(
    r"(?<=\.weight)\.(nested_)?(absmax|quant_map|quant_state\..+)$|(?<=\.)(SCB|weight_format)$"
)


def quantization_of(config: PretrainedConfig) -> str:
    """The name of the config's quantization method; empty if there is none."""
    # A config of text and images has one for text inside, which has the field too.
    for part in (config, config.get_text_config(decoder=True)):
        setting = getattr(part, OPTION, None)
        if setting is not None:
            fields = setting if isinstance(setting, dict) else setting.to_dict()
            method = fields.get("quant_method", "unknown")
            # A string in a file, an enum in memory.
            return str(getattr(method, "value", method))
    return ""


def require_readable(config: PretrainedConfig, origin: str = "") -> None:
    """Refuse weights that are quantized by another method; the error names their `origin`.

    Raises:
        UnsupportedModel: They are.
    """
    method = quantization_of(config)
    if method not in ("", METHOD):
        refuse_quantized(method, origin)


def refuse_quantized(method: str, origin: str = "") -> None:
    """Refuse weights that are quantized by this method, or have this dtype.

    Raises:
        UnsupportedModel: Always; it names their `origin`.
    """
    refusal = _REFUSED.format(method=method)
    raise UnsupportedModel(f"{origin}: {refusal}" if origin else refusal)


def without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of the config for plain weights."""
    config = copy.deepcopy(config)
    for each in (config, config.get_text_config(decoder=True)):
        vars(each).pop(OPTION, None)
    return config


# --- building ---------------------------------------------------------------------------------


def settings_of(kind: str, dtype: torch.dtype) -> dict[str, BitsAndBytesConfig]:
    """The option of `from_pretrained` for a kind of `ModelSpec.quantize`; empty for `off`.

    Args:
        kind: `off`, `nf4` or `int8`.
        dtype: The dtype of matrix products with NF4 weights.

    Raises:
        ConfigError: The package that it needs is not installed.
    """
    if kind == "off":
        return {}
    _require_installed(kind)
    if kind == "int8":
        return {OPTION: BitsAndBytesConfig(load_in_8bit=True)}
    return {
        OPTION: BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype
        )
    }


def as_whole(
    whole: PreTrainedModel, config: PretrainedConfig, head: Sequence[str], options: dict[str, Any]
) -> tuple[PretrainedConfig, dict[str, Any]]:
    """Config and options by which a part quantizes the layers that the unsplit model would.

    By default transformers leaves out the last module, and in a part that is another one.

    Args:
        whole: The unsplit model on the meta device.
        config: Its config, which says how the weights of its files are quantized, if they are.
        head: The modules that train in full, which are not quantized.
        options: For `from_pretrained`.

    Raises:
        ConfigError: The weights would be quantized twice, or the package for it is missing.
    """
    given, stored = options.get(OPTION), getattr(config, OPTION, None)
    if given is None and stored is None:
        return config, options
    if given is not None and stored is not None:
        raise ConfigError(
            f"the weights of this {type(whole).__name__} are quantized already "
            f"({quantization_of(config)}); leave {OPTION} and model.quantize out"
        )
    _require_installed(quantization_of(config) or METHOD)
    settings = _read(given if stored is None else stored)
    skipped = settings.llm_int8_skip_modules
    if skipped is None:
        skipped = get_keys_to_not_convert(whole)
    settings.llm_int8_skip_modules = [*skipped, *head]
    # Else transformers would load the part on the first GPU; it is moved when it is complete.
    options = {"device_map": {"": "cpu"}, **options}
    if stored is None:
        return config, {**options, OPTION: settings}
    config = copy.deepcopy(config)
    setattr(config, OPTION, settings.to_dict())
    return config, options


def _read(settings: Any) -> BitsAndBytesConfig:
    read: Any = settings.to_dict() if isinstance(settings, BitsAndBytesConfig) else settings
    if not isinstance(read, dict):
        raise ConfigError(
            f"{OPTION}={type(settings).__name__} is not available; parts take BitsAndBytesConfig"
        )
    found: Any = BitsAndBytesConfig.from_dict(read)
    return cast(BitsAndBytesConfig, found)


def _require_installed(what: str) -> None:
    if importlib.util.find_spec(METHOD) is None:
        raise ConfigError(
            f"weights in {what} need {METHOD}, which is not installed here: pip install "
            "'fedsplit[quantize]'"
        )


def for_training(model: nn.Module) -> None:
    """Have quantized layers compute with one kernel, whether a gradient is asked for or not.

    On processors with bfloat16, bitsandbytes packs a layer's weight anew for the first pass without
    a graph. Later passes compute with that, and give their input no gradient.
    """
    for _, layer in quantized_layers(model):
        vars(layer)["support_avx512bf16_for_cpu"] = False


def require_statistics(model: nn.Module, origin: str) -> None:
    """Refuse plain weights where the config says that they are quantized.

    Args:
        model: A model that was just loaded.
        origin: The source of its tensors, for the error.

    Raises:
        CheckpointError: There is one.
    """
    for name, layer in model.named_modules():
        if hasattr(layer, "source_cls"):
            found = (getattr(layer.weight, each, None) for each in ("quant_state", "SCB"))
            if all(statistics is None for statistics in found):
                raise CheckpointError(
                    f"{origin}: '{name}.weight' is not quantized, but {OPTION} in config.json says "
                    f"that it is ({METHOD}); save the model again, or remove {OPTION}"
                )


def copy_plain(model: nn.Module) -> None:
    """Move what is not quantized out of the mapped files, where tensors may be unaligned."""
    quantized = {id(layer._parameters["weight"]) for _, layer in quantized_layers(model)}
    for parameter in model.parameters():
        if id(parameter) not in quantized:
            parameter.data = parameter.data.clone()
    for buffer in model.buffers():
        buffer.data = buffer.data.clone()


def weight_of(name: str) -> str:
    """The name of the weight that a tensor in a file belongs to; of a plain one its own.

    >>> weight_of("layers.0.q_proj.weight.absmax"), weight_of("layers.0.q_proj.SCB")
    ('layers.0.q_proj.weight', 'layers.0.q_proj.weight')
    """
    found = _STATISTICS.search(name)
    if found is None:
        return name
    return name[: found.start()] + ("weight" if found[3] else "")


# --- weights in memory ------------------------------------------------------------------------


def is_quantized(layer: nn.Module) -> bool:
    """Whether the weight of this module itself is quantized."""
    return type(layer._parameters.get("weight")).__name__ in (_FOUR_BITS, _EIGHT_BITS)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The names and layers of a model whose weights are quantized."""
    return ((name, module) for name, module in model.named_modules() if is_quantized(module))


def twin_of(weight: Any) -> nn.Parameter:
    """A frozen parameter of its own that shares the memory of a frozen parameter."""
    twin: Any
    if type(weight).__name__ == _FOUR_BITS:
        twin = copy.copy(weight)
        # A move to another device writes into the statistics.
        twin.quant_state, twin.module = copy.copy(weight.quant_state), None
        if twin.quant_state.nested:
            twin.quant_state.state2 = copy.copy(twin.quant_state.state2)
        return cast(nn.Parameter, twin)
    if type(weight).__name__ == _EIGHT_BITS:
        twin = type(weight)(weight.data, requires_grad=False, CB=weight.CB, SCB=weight.SCB)
        return cast(nn.Parameter, twin)
    return nn.Parameter(weight.detach(), requires_grad=False)


def share_weight(layer: nn.Module, weight: Any) -> None:
    """Let a quantized layer use the memory of another layer's equal weight."""
    # The layers keep apart what their first pass takes out of the parameter.
    twin: Any = twin_of(weight)
    layer._parameters["weight"] = twin
    if hasattr(layer, "quant_state"):
        layer.quant_state = twin.quant_state


def plain_layer(layer: Any) -> nn.Module:
    """The layer of the family that computes with the values of a quantized layer's weight.

    Returns:
        A new `nn.Linear`, or a `Conv1D` where the family has that, without a graph.
    """
    values, width, height = _values(layer.weight, layer), layer.in_features, layer.out_features
    if issubclass(layer.source_cls, Conv1D):
        plain: Any = Conv1D(height, width)
        values = values.T.contiguous()
    else:
        plain = nn.Linear(width, height, bias=layer.bias is not None)
    plain.weight = nn.Parameter(values, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return cast(nn.Module, plain)


def _values(weight: Any, layer: Any) -> Tensor:
    if type(weight).__name__ == _FOUR_BITS:
        values: Tensor = dequantize_bnb_weight(weight)
        return values
    # The first pass moves the scales of the rows out of the weight.
    scales: Tensor = layer.state.SCB if weight.SCB is None else weight.SCB
    weight_EC: Tensor = weight.data
    return weight_EC * (scales.to(weight.device) / 127).unsqueeze(1)
