"""Rotary tables that a family chooses by the largest position of a pass (longrope, dynamic NTK).

A pass with a larger position, such as one that other sequences share, would give a sequence other
tables than its own pass.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PretrainedConfig

_PLAIN = ("rope_theta", "partial_rotary_factor")


def by_length(config: PretrainedConfig) -> bool:
    """Whether the rotary tables of a model depend on the largest position of a pass."""
    return any(_is_by_length(each["rope_type"]) for each in _parameters(config))


def tables_of(config: PretrainedConfig, largest: int) -> tuple[int, ...]:
    """A key of the rotary tables of a pass whose largest position is `largest`.

    Keys do not decrease with the position: if two positions have the same key, so have all
    positions between them.
    """
    kinds = [each for each in _parameters(config) if _is_by_length(each["rope_type"])]
    return tuple(_table(each, _text(config).max_position_embeddings, largest) for each in kinds)


def remove_lengths(config: PretrainedConfig) -> None:
    """Replace the rotary tables that depend on lengths by plain ones, in place.

    A dry run has no values, so it cannot choose tables by them.
    """
    for each in _parameters(config):
        if _is_by_length(each["rope_type"]):
            plain = {name: each[name] for name in _PLAIN if name in each}
            each.clear()
            each.update(plain, rope_type="default")


def forget_lengths(model: nn.Module) -> None:
    """Have the rotary modules of a model choose tables by the current pass alone.

    A module with dynamic NTK keeps the tables of its longest pass, so its output would depend on
    the sequences that the model has seen before.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if any("dynamic" in kind for kind in _by_layer_type(kinds).values()):
            module.register_forward_pre_hook(_reset)


def _reset(module: Any, _: Any) -> None:
    for layer_type, kind in _by_layer_type(module.rope_type).items():
        if "dynamic" in kind:
            prefix = f"{layer_type}_" if layer_type else ""
            original = getattr(module, f"{prefix}original_inv_freq")
            # The name of the buffer stays registered, so that it follows the module's device.
            setattr(module, f"{prefix}inv_freq", original)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _by_layer_type(kinds: Any) -> dict[str, str]:
    """The rope type of each layer type; the layer type is empty if all layers have the same."""
    if isinstance(kinds, str):
        return {"": kinds}
    return kinds if isinstance(kinds, dict) else {}


def _text(config: PretrainedConfig) -> Any:
    return config.get_text_config(decoder=True)


def _parameters(config: PretrainedConfig) -> Iterator[dict[str, Any]]:
    """The rotary parameters of each layer type, or the one set that all layers share."""
    parameters = getattr(_text(config), "rope_parameters", None) or {}
    nested = [each for each in parameters.values() if isinstance(each, dict)]
    yield from (each for each in nested or [parameters] if each.get("rope_type"))


def _is_by_length(rope_type: str) -> bool:
    return rope_type == "longrope" or "dynamic" in rope_type


def _table(parameters: dict[str, Any], max_positions: int, largest: int) -> int:
    if parameters["rope_type"] == "longrope":
        return int(largest >= parameters["original_max_position_embeddings"])
    return max(0, largest + 1 - max_positions)
