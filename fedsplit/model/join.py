"""The unsplit model of two parts, with adapters merged into its weights as peft merges them."""

import copy
import warnings
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedsplit.errors import ConfigError
from fedsplit.model.adapter_config import without_wrapper
from fedsplit.model.build import load_tensors
from fedsplit.model.identity import misfit
from fedsplit.model.part_files import TRUNK_VERSION
from fedsplit.model.quantization import (
    is_quantized,
    plain_layer,
    quantized_layers,
    without_quantization,
)
from fedsplit.model.source import on_meta
from fedsplit.model.stage import AUXILIARY, ClientPart, TrunkPart


def join_model(client: ClientPart | PeftModel, trunk: TrunkPart | PeftModel) -> PreTrainedModel:
    """The unsplit model of two parts, with copies of their tensors; adapters are merged.

    `save_pretrained` of the result writes what that of the family's own model writes. If an adapter
    changed only one of two tied weights, the result is not tied. A part may be in a `PeftModel`.

    Raises:
        ConfigError: The parts are not from the same model or the same cut, or an adapter cannot be
            merged.

    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from fedsplit import split_model
    >>> config = GPT2Config(n_layer=4, n_embd=8, n_head=2, vocab_size=32, n_positions=16)
    >>> whole = GPT2LMHeadModel(config).eval()
    >>> parts = split_model(whole, "1/2/1")
    >>> again = join_model(parts.client, parts.trunk)
    >>> again_state = again.state_dict()
    >>> all(torch.equal(tensor, again_state[k]) for k, tensor in whole.state_dict().items())
    True
    """
    client, trunk = without_wrapper(client), without_wrapper(trunk)
    same = (client.family, client.plan, client.trunk_blocks)
    if same != (trunk.family, trunk.plan, trunk.trunk_blocks):
        raise ConfigError(
            f"these parts do not fit: the client is {client.family.__name__} with blocks "
            f"{client.trunk_blocks} elsewhere, the trunk {trunk.family.__name__} with blocks "
            f"{trunk.trunk_blocks}"
        )
    if found := misfit(client.identity, trunk.identity):
        raise ConfigError(f"these parts do not fit: {found}")
    # Names are those of the unsplit model in both parts, so the union of the two is its state.
    tensors = {k: t.clone() for part in (trunk, client) for k, t in folded_state(part).items()}
    whole = _with_tensors(client.family, client, tensors, "the parts")
    if hasattr(client, "generation_config"):
        whole.generation_config = copy.deepcopy(client.generation_config)
    return whole


def folded_model(whole: PreTrainedModel) -> PreTrainedModel:
    """An unsplit model with its adapters merged into its weights; `whole` itself if it has none.

    Raises:
        ConfigError: An adapter cannot be merged.
    """
    if not _adapters(whole):
        return whole
    return _with_tensors(type(whole), whole, folded_state(whole), "the trained model")


def folded_state(part: PreTrainedModel) -> dict[str, Tensor]:
    """The part's tensors by the unsplit model's names, with adapters merged into the weights.

    The tensors compute what the part computes now: adapters that are not active or that are
    disabled do not count, and merged ones count once. An auxiliary head is left out, since the
    unsplit model has none. Quantized weights have the values that the part computes with.

    Raises:
        ConfigError: peft cannot merge an adapter.
    """
    adapters = _adapters(part)
    inside = (f"{AUXILIARY}.", TRUNK_VERSION, *(f"{name}." for name in adapters))
    quantized = {n: layer for n, layer in quantized_layers(part) if not n.startswith(inside)}
    others = (*inside, *(f"{name}." for name in quantized))
    state = {n: tensor for n, tensor in part.state_dict().items() if not n.startswith(others)}
    for name, module in {**quantized, **adapters}.items():
        plain = _merged(name, module) if name in adapters else plain_layer(module)
        state.update({f"{name}.{n}": tensor for n, tensor in plain.state_dict().items()})
    return state


def _adapters(part: nn.Module) -> dict[str, nn.Module]:
    """The part's modules of peft by name, without those inside of others."""
    found: dict[str, nn.Module] = {}
    for name, module in part.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if not is_inside and type(module).__module__.startswith("peft."):
            found[name] = module
    return found


def _merged(name: str, adapter: nn.Module) -> nn.Module:
    """The module that replaces an adapter, on tensors of its own."""
    # One layer at a time is copied, since peft merges in place.
    adapter = _on_plain_layer(copy.deepcopy(adapter))
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            return _unwrapped(adapter)
    except (NotImplementedError, RuntimeError, ValueError) as exc:
        raise ConfigError(
            f"'{name}': its adapter ({type(adapter).__name__} of peft) cannot be merged into the "
            f"model ({exc}); save it with save_adapter, or disable it"
        ) from exc


def _on_plain_layer(adapter: Any) -> nn.Module:
    """The adapter itself; that of a quantized layer becomes one of a plain layer."""
    inner = getattr(adapter, "base_layer", None)
    if isinstance(inner, nn.Module) and is_quantized(inner):
        # Merged into the quantized weight, the adapter would be rounded to its few values.
        adapter.base_layer = plain_layer(inner)
        adapter.fan_in_fan_out = isinstance(adapter.base_layer, Conv1D)
        adapter.__class__ = Linear
    return cast(nn.Module, adapter)


def _unwrapped(adapter: nn.Module) -> nn.Module:
    if isinstance(adapter, AuxiliaryTrainingWrapper):
        return _unwrapped_auxiliary(adapter)
    if not isinstance(adapter, BaseTunerLayer):
        raise NotImplementedError("peft has no merge for it")
    # peft's forward has the same three cases.
    if adapter.disable_adapters:
        if adapter.merged:
            adapter.unmerge()
    elif not adapter.merged:
        adapter.merge()
    # Adapters of several parameters of a module are wrapped into each other.
    inner = cast(nn.Module, adapter.base_layer)
    return _unwrapped(inner) if isinstance(inner, BaseTunerLayer) else inner


def _unwrapped_auxiliary(adapter: Any) -> nn.Module:
    """The module of `modules_to_save` or `trainable_token_indices` that its forward uses."""
    if hasattr(adapter, "token_adapter"):
        return _unwrapped(adapter.token_adapter)
    active = adapter.active_adapters
    if adapter.disable_adapters or not active or active[0] not in adapter.modules_to_save:
        original: nn.Module = adapter.original_module
        return original
    saved: nn.Module = adapter.modules_to_save[active[0]]
    return _unwrapped(saved) if isinstance(saved, BaseTunerLayer) else saved


def _with_tensors(
    family: type[PreTrainedModel], like: PreTrainedModel, tensors: dict[str, Tensor], origin: str
) -> PreTrainedModel:
    """A model of the family, in dtype and attention like `like`, with these tensors.

    Raises:
        ConfigError: A tensor has no place in the model.
    """
    config = _config_for(family, like.config, tensors)
    whole: PreTrainedModel = load_tensors(
        family,
        config,
        tensors,
        origin,
        dtype=like.dtype,
        attn_implementation=config._attn_implementation,
    )
    if unknown := sorted(tensors.keys() - whole.state_dict().keys()):
        raise ConfigError(f"{origin}: {family.__name__} has no tensor '{unknown[0]}'")
    # transformers saves under the names that it has loaded, which are those in memory here. Other
    # programs read the names of the family's checkpoints, which it takes if this is not set.
    vars(whole).pop("_weight_conversions", None)
    return whole


def _config_for(
    family: type[PreTrainedModel], config: PretrainedConfig, tensors: dict[str, Tensor]
) -> PretrainedConfig:
    """The config, without ties of weights that differ."""
    config = without_quantization(config)
    # The model takes a copy, since transformers writes to the config of a model that it builds.
    ties = on_meta(family, copy.deepcopy(config)).all_tied_weights_keys
    if not all(torch.equal(tensors[target], tensors[source]) for target, source in ties.items()):
        # A config of text and images has one for text inside, which has the field too.
        for each in (config, config.get_text_config(decoder=True)):
            each.tie_word_embeddings = False
    return config
