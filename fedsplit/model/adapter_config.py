"""The configs of peft adapters: which ones parts take, and what they change."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
)
from torch import nn
from transformers import PreTrainedModel

from fedsplit.errors import CheckpointError, ConfigError
from fedsplit.model.json_files import read_json
from fedsplit.model.source import Source

P = TypeVar("P", bound=PreTrainedModel)

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
SAME = (
    "r lora_alpha use_rslora rank_pattern alpha_pattern bias lora_bias use_dora kasa_config "
    "use_bdlora init_lora_weights".split()
)


def saved_config(origin: Source) -> LoraConfig:
    """The config of a saved adapter.

    Raises:
        CheckpointError: It cannot be read, or `check_config` refuses it.
    """
    fields = read_json(origin.file(NAME))
    try:
        # It warns of fields of a newer peft and leaves them out.
        config = PeftConfig.from_peft_type(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
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
    for each in dataclasses.fields(config):
        if each.name not in _SUPPORTED and getattr(config, each.name) != _default(each):
            reason = _REASONS.get(each.name, "parts have not been compared with it")
            raise CheckpointError(f"{origin}: {each.name} is not supported: {reason}")
    return config


def _default(each: "dataclasses.Field[Any]") -> Any:
    if each.default_factory is not dataclasses.MISSING:
        return each.default_factory()
    return each.default


def without_wrapper(part: P | PeftModel) -> P:
    """The part itself, if `get_peft_model` has wrapped it.

    Raises:
        ConfigError: Its adapter is a prompt, which is in the wrapper.
    """
    if not isinstance(part, PeftModel):
        return part
    if part.active_peft_config.is_prompt_learning:
        kind = getattr(part.active_peft_config.peft_type, "value", "")
        raise ConfigError(f"an adapter of type {kind} is a prompt, which has no place in the model")
    return cast(P, part.get_base_model())


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


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedModules:
    """What an adapter changes, by full names in the unsplit model.

    Attributes:
        targets: Layers with an adapter.
        parameters: Parameters with an adapter, such as those of fused experts.
        saved: Modules that train in full, in place of the model's own.
        tokens: Embeddings of which only some tokens train, and these tokens.
    """

    targets: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    tokens: dict[str, list[int]] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module, adapter: str) -> "AdaptedModules":
        """Those of the adapter of this name in a model."""
        targets, parameters, saved, tokens = [], [], [], {}
        for full_name, module in model.named_modules():
            name = full_name.replace(".base_layer", "")
            if isinstance(module, ParamWrapper) and adapter in module.r:
                parameters.append(f"{name}.{module.parameter_name}")
            elif isinstance(module, LoraLayer) and adapter in module.r:
                targets.append(name)
            elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
                saved.append(name)
            elif isinstance(module, TrainableTokensWrapper):
                layer = module.token_adapter
                # peft ties the tokens of a head by itself.
                if adapter in layer.token_indices and not layer.tied_adapter:
                    tokens[name] = layer.token_indices[adapter]
        return AdaptedModules(
            targets=tuple(targets), parameters=tuple(parameters), saved=tuple(saved), tokens=tokens
        )

    def only(self, keep: Callable[[str], bool]) -> "AdaptedModules":
        """Those whose names are kept."""
        return AdaptedModules(
            targets=tuple(filter(keep, self.targets)),
            parameters=tuple(filter(keep, self.parameters)),
            saved=tuple(filter(keep, self.saved)),
            tokens={name: self.tokens[name] for name in filter(keep, self.tokens)},
        )

    def __add__(self, other: "AdaptedModules") -> "AdaptedModules":
        return AdaptedModules(
            targets=self.targets + other.targets,
            parameters=self.parameters + other.parameters,
            saved=self.saved + other.saved,
            tokens=self.tokens | other.tokens,
        )

    def write_to(self, config: LoraConfig) -> None:
        """Let the config name these modules and no others."""
        config.target_modules = sorted(self.targets)
        config.target_parameters = sorted(self.parameters)
        config.modules_to_save = sorted(self.saved) or None
        config.trainable_token_indices = self.tokens or None
        # They have been applied, and peft warns if they have no effect.
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def shared_config(configs: Sequence[LoraConfig]) -> LoraConfig:
    """A copy of the config of client and trunk, or of the one that has an adapter.

    Raises:
        ConfigError: The two differ in more than their modules, or there is none.
    """
    if not configs:
        raise ConfigError("neither client nor trunk has adapters to save; set lora.enabled=true")
    first, last = configs[0], configs[-1]
    for name in SAME:
        if getattr(first, name) != getattr(last, name):
            raise ConfigError(
                f"the adapters of client and trunk are not of one kind: {name} is "
                f"{getattr(first, name)} and {getattr(last, name)}; add both with one config"
            )
    return copy.deepcopy(first)
