"""The configs of peft adapters: which ones parts take, and the one config of two parts."""

import copy
import dataclasses
import json
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
)
from transformers import PreTrainedModel

from fedsplit.errors import CheckpointError, ConfigError
from fedsplit.model.source import Source

NAME = "adapter_config.json"

# The fields that may differ from their defaults. The others change what a layer computes in a way
# that has not been compared with the unsplit model, or for one of the reasons below.
_SUPPORTED = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern fan_in_fan_out bias lora_bias "
    "target_modules exclude_modules target_parameters layers_to_transform layers_pattern "
    "modules_to_save trainable_token_indices init_lora_weights eva_config "
    "use_dora kasa_config use_bdlora runtime_config megatron_core qalora_group_size".split()
)
_REASONS = {
    "alora_invocation_tokens": "aLoRA looks for tokens of the prompt, which the trunk does not get",
    "arrow_config": "Arrow chooses among several adapters, and a part has one",
    "corda_config": "CorDA changes the frozen weights with statistics not in the adapter",
    "layer_replication": "it adds blocks to the model",
    "loftq_config": "LoftQ replaces the frozen weights by quantized ones",
    "lora_ga_config": "LoRA-GA changes the frozen weights with gradients not in the adapter",
    "megatron_config": "Megatron's layers are not those of transformers",
    "monteclora_config": "MonteCLoRA adds a term to the loss",
    "use_qalora": "QALoRA needs quantized weights",
    "velora_config": "VeLoRA compresses gradients with statistics of the whole batch",
}
# The fields in which the adapters of two parts of one model may not differ.
_SAME = (
    "r lora_alpha use_rslora rank_pattern alpha_pattern bias lora_bias use_dora kasa_config "
    "use_bdlora init_lora_weights".split()
)


def saved_config(origin: Source) -> LoraConfig:
    """The config of a saved adapter.

    Raises:
        CheckpointError: It cannot be read, or `check_config` refuses it.
    """
    try:
        fields: dict[str, Any] = json.loads(origin.file(NAME).read_text(encoding="utf-8"))
        # It warns of fields of a newer peft and leaves them out.
        config = PeftConfig.from_peft_type(**fields)
    except (OSError, ValueError, TypeError, KeyError) as exc:
        first_line = (str(exc).splitlines() or [type(exc).__name__])[0]
        raise CheckpointError(
            f"{origin.name}: {NAME} does not describe an adapter ({first_line})"
        ) from exc
    return check_config(config, origin.name)


def check_config(config: PeftConfig, origin: str) -> LoraConfig:
    """The config, if parts with it compute and train exactly as the unsplit model does.

    Raises:
        CheckpointError: The config is refused; says which field, and why.
    """
    # Other kinds have configs that are subclasses.
    if type(config) is not LoraConfig:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise CheckpointError(f"{origin}: an adapter of type {kind}; parts take LORA only")
    for field in dataclasses.fields(config):
        if field.name not in _SUPPORTED and getattr(config, field.name) != _default(field):
            reason = _REASONS.get(field.name, "parts have not been compared with it")
            raise CheckpointError(f"{origin}: {field.name} is not supported: {reason}")
    return config


def _default(field: "dataclasses.Field[Any]") -> Any:
    is_made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if is_made else field.default


def active_adapter(part: PreTrainedModel) -> str:
    """The name of the part's adapter; of several, the active one. Empty if there is none.

    Raises:
        ConfigError: Several adapters are active, or none of several.
    """
    known: dict[str, PeftConfig] = getattr(part, "peft_config", {})
    if len(known) < 2:
        return next(iter(known), "")
    active = {
        name
        for module in part.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for name in module.active_adapters
    }
    if len(active) != 1:
        raise ConfigError(
            f"{type(part).__name__} has the adapters {', '.join(sorted(known))}, of which "
            f"{len(active)} are active; activate one with peft's set_adapter"
        )
    return active.pop()


def config_of(part: PreTrainedModel, adapter: str, origin: str) -> LoraConfig:
    """The config of a part's adapter, with the full names of what the part holds of it.

    Raises:
        CheckpointError: `check_config` refuses it; the message names `origin`.
    """
    config = copy.deepcopy(check_config(part.peft_config[adapter], origin))
    modules, parameters, saved, tokens = [], [], [], {}
    for full_name, module in part.named_modules():
        name = full_name.replace(".base_layer", "")
        if isinstance(module, ParamWrapper) and adapter in module.r:
            parameters.append(f"{name}.{module.parameter_name}")
        elif isinstance(module, LoraLayer) and adapter in module.r:
            modules.append(name)
        elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            saved.append(name)
        elif isinstance(module, TrainableTokensWrapper) and not module.token_adapter.tied_adapter:
            # peft ties the head's by itself.
            tokens[name] = module.token_adapter.token_indices[adapter]
    config.target_modules, config.target_parameters = modules, parameters
    config.modules_to_save, config.trainable_token_indices = saved, tokens
    return config


def joined_config(client: LoraConfig | None, trunk: LoraConfig | None) -> LoraConfig:
    """The config of the unsplit model's adapter; the arguments come from `config_of`.

    Raises:
        ConfigError: The two differ in more than their modules, or neither is given.
    """
    configs = [config for config in (client, trunk) if config is not None]
    if not configs:
        raise ConfigError("neither client nor trunk has adapters to save; set lora.enabled=true")
    first, last = configs[0], configs[-1]
    for field in _SAME:
        if getattr(first, field) != getattr(last, field):
            raise ConfigError(
                f"the adapters of client and trunk are not of one kind: {field} is "
                f"{getattr(first, field)} and {getattr(last, field)}; add both with one config"
            )
    joined = copy.deepcopy(first)
    for field in ("target_modules", "target_parameters", "modules_to_save"):
        setattr(joined, field, sorted(name for c in configs for name in getattr(c, field)))
    joined.trainable_token_indices = {
        name: indices for c in configs for name, indices in c.trainable_token_indices.items()
    }
    joined.exclude_modules = joined.layers_to_transform = joined.layers_pattern = None
    joined.inference_mode = True
    return joined
