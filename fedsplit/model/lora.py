"""Low-rank adapters on the parts of a model, and the parameters that train.

The targets are those that peft selects on the unsplit model, so the adapters of all parts form one
ordinary peft adapter of that model. A classifier's head trains in full, as with peft's
`modules_to_save`, because it is often new. (Hu et al. 2021, "LoRA", arXiv 2106.09685.)
"""

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import (
    LoraConfig,
    LoraModel,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.utils.constants import (
    DUMMY_TARGET_MODULES,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedsplit.errors import CheckpointError, ConfigError
from fedsplit.model.adapter_config import (
    SAME,
    AdaptedModules,
    active_adapter,
    check_config,
    saved_config,
    shared_config,
    without_wrapper,
)
from fedsplit.model.identity import ADAPTER, adapter_digest
from fedsplit.model.plan import plan_for
from fedsplit.model.quantization import is_quantized, quantization_of, share_weight
from fedsplit.model.source import Source, on_meta
from fedsplit.model.stage import ClientPart, Part, TrunkPart
from fedsplit.model.tensor_files import read_tensors, tensor_names
from fedsplit.model.tensor_parallel import (
    local_of,
    num_ranks,
    require_adaptable,
    shard_of,
    sized_as_whole,
)
from fedsplit.randomness import process_state, rng_scope
from fedsplit.spec import LoraSpec

# Names that peft fixes: of the adapter, and of tensors and files on disk.
_ADAPTER = "default"
_SAVED_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"


def add_adapters(part: PreTrainedModel, lora: LoraSpec, seed: int = 0) -> None:
    """Freeze the part and add the adapters that `lora` sets; do nothing if it is not enabled.

    `lora` enables bottom and top separately, although one model holds both. New adapters do not
    change the output. A classifier's head always trains in full. The caller's random state does
    not change.

    Args:
        part: Client, trunk, or the unsplit model, which gets all adapters; changed in place.
        lora: Rank, alpha, dropout, targets, and the parts that get adapters.
        seed: The seed of the adapters' initial values.

    Raises:
        ConfigError: A target matches no module that can have an adapter, or nothing would train.
    """
    if not lora.enabled:
        return
    config, modules = _config_for_whole(part, lora)
    _require_a_place(part, modules, lora)
    _inject(part, config, modules.only(lambda name: _is_enabled(part, name, lora)), seed)


def _require_a_place(part: PreTrainedModel, modules: AdaptedModules, lora: LoraSpec) -> None:
    """Raise ConfigError if `lora` enables no place of a target, in this part or the other."""
    has_head = bool(plan_for(_family_of(part), part.config).head)
    if has_head or not isinstance(part, Part):
        return
    places = sorted({part.place_of(name) for name in modules.targets + modules.parameters})
    if not any(_places(lora)[place] for place in places):
        raise ConfigError(
            f"lora.targets={lora.targets}: all are in the {' and the '.join(places)}, but "
            f"{' and '.join(f'lora.{place}=false' for place in places)}, so nothing would train"
        )


def load_adapter(part: PreTrainedModel, source: str, revision: str = "main") -> None:
    """Freeze the part and load its share of a peft adapter of the unsplit model, ready to train.

    Args:
        part: Client, trunk, or the unsplit model; changed in place.
        source: Directory or hub id with adapter_config.json and adapter_model.safetensors, as
            `save_adapter` and peft write them.
        revision: The branch, tag or commit of a hub id.

    Raises:
        CheckpointError: The source is not an adapter of this model, or not of a kind that parts
            take (`fedsplit.model.adapter_config`).
    """
    origin = Source(name=source, revision=revision)
    config = saved_config(origin)
    # A saved adapter is in inference mode, in which peft freezes it.
    config.inference_mode = False
    settings = {name: getattr(config, name) for name in SAME}
    try:
        modules = _resolved(part, _adapted_whole(part, config))
        own = modules.only(lambda name: _is_enabled(part, name, LoraSpec()))
        _inject(part, config, own, seed=0)
    except (ValueError, TypeError) as exc:
        raise CheckpointError(
            f"{source}: not an adapter of {_family_of(part).__name__} ({_first_line(exc)})"
        ) from exc
    _copy_saved(part, file := origin.file(_WEIGHTS), source)
    names = [name.removeprefix(_SAVED_PREFIX) for name in tensor_names(file)]
    # Client and trunk must have it both, unless it changes nothing in the trunk.
    if isinstance(part, Part) and any(part.place_of(name) == "trunk" for name in names):
        part.identity[ADAPTER] = adapter_digest(file, settings)


def _copy_saved(part: PreTrainedModel, file: Path, source: str) -> None:
    """Copy the part's share of a saved adapter into its adapters and head."""
    own, base = _held(part, _adapter_state(part)), part.state_dict()
    saved = {n.removeprefix(_SAVED_PREFIX): n for n in tensor_names(file) if _is_of(part, n)}
    # peft saves the frozen weight of an embedding or a head that has an adapter, too.
    frozen = (saved.keys() & base.keys()) - own.keys()
    if unmatched := sorted(own.keys() ^ (saved.keys() - frozen)):
        problem = "is missing" if unmatched[0] in own else "does not exist in this model"
        raise CheckpointError(f"{source}: tensor '{unmatched[0]}' {problem}")
    for name, tensor in read_tensors(file, list(saved.values())).items():
        plain = name.removeprefix(_SAVED_PREFIX)
        target = base[plain] if plain in frozen else own[plain]
        if target.shape != tensor.shape:
            raise CheckpointError(
                f"{source}: tensor '{name}' has shape {tuple(tensor.shape)}, but this model takes "
                f"{tuple(target.shape)}"
            )
        target, tensor = local_of(target), shard_of(target, tensor)
        if plain in frozen and not torch.equal(target, tensor.to(target)):
            raise CheckpointError(
                f"{source}: tensor '{name}' differs from this model's, so the adapter is of "
                "another model; load the one that it was trained with"
            )
        target.copy_(tensor)


def _held(part: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of adapters with the part's own tensors in place of those that peft gathered."""
    if num_ranks(part) == 1:
        return state
    own = part.state_dict()
    adapted = (re.sub(r"\.(lora_[AB])\.", rf".\1.{_ADAPTER}.", name) for name in state)
    return {name: own[held] for name, held in zip(state, adapted, strict=True)}


def _adapter_state(part: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of the part's adapters and head, by name in a saved adapter; not copied."""
    adapters: dict[str, Tensor] = {}
    if adapter := active_adapter(part):
        # "auto" would look up the base model on the hub to compare vocabulary sizes.
        with _quiet():
            adapters = get_peft_model_state_dict(
                part, adapter_name=adapter, save_embedding_layers=False
            )
    heads = {
        f"{head}.{name}": tensor
        for head in plan_for(_family_of(part), part.config).head
        if not isinstance(part, Part) or part.holds(head)
        for name, tensor in part.get_submodule(head).state_dict().items()
    }
    return {**adapters, **heads}


def _is_of(part: PreTrainedModel, saved: str) -> bool:
    return not isinstance(part, Part) or part.holds(saved.removeprefix(_SAVED_PREFIX))


def _inject(part: PreTrainedModel, config: LoraConfig, own: AdaptedModules, seed: int) -> None:
    """Freeze the part, and add adapters to its `own` modules; the config is changed."""
    if active_adapter(part):
        raise ConfigError(
            f"this {_family_of(part).__name__} has an adapter; add one to a part without adapters"
        )
    require_adaptable(part, (*own.targets, *own.parameters))
    part.requires_grad_(False)
    dtype = part.dtype
    own.write_to(config)
    has_targets = bool(own.targets or own.parameters)
    if not has_targets:
        # peft refuses a config without targets otherwise.
        config.target_modules = DUMMY_TARGET_MODULES
    if has_targets or own.saved or own.tokens or config.bias == "all":
        with rng_scope(seed), _quiet(), sized_as_whole(part, own.targets):
            inject_adapter_in_model(config, part, _ADAPTER)
        # New modules are in training mode, even if the part is not.
        part.train(part.training)
        if quantization_of(part.config):
            # peft takes the dtype of an adapter from the weight, whose values are floats no more.
            for parameter in trainable(part).values():
                parameter.data = parameter.data.to(dtype)
    for name in plan_for(_family_of(part), part.config).head:
        part.get_submodule(name).requires_grad_(True)


def _is_enabled(part: PreTrainedModel, module: str, lora: LoraSpec) -> bool:
    """Whether the part holds the module, and `lora` enables it."""
    if not isinstance(part, Part):
        return True
    return part.holds(module) and _places(lora)[part.place_of(module)]


def _places(lora: LoraSpec) -> dict[str, bool]:
    return {"bottom": lora.bottom, "trunk": lora.trunk, "top": lora.top}


def _family_of(part: PreTrainedModel) -> type[PreTrainedModel]:
    return part.family if isinstance(part, Part) else type(part)


def share_frozen(part: PreTrainedModel, other: PreTrainedModel) -> None:
    """Replace the frozen tensors of a part by equal tensors of another part, to save memory.

    Args:
        part: A part of the same model, which may have other adapters; changed in place.
        other: The part that keeps its tensors.
    """
    others = {
        _plain(name): parameter
        for name, parameter in other.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }
    # A list, since the loop changes what is iterated; tied parameters under all of their names.
    for name, own in list(part.named_parameters(remove_duplicate=False)):
        same = others.get(_plain(name))
        if same is not None and not own.requires_grad and torch.equal(own, same):
            owner, _, leaf = name.rpartition(".")
            module = part.get_submodule(owner)
            if leaf == "weight" and is_quantized(module):
                share_weight(module, same)
            else:
                module._parameters[leaf] = same


def _plain(parameter: str) -> str:
    """The name of a parameter without what peft adds where it wraps a module."""
    return re.sub(r"\.(base_layer|original_module)(?=\.)", "", parameter)


def trainable(part: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; tied ones once."""
    return {name: p for name, p in part.named_parameters() if p.requires_grad}


def save_adapter(
    client: ClientPart | PeftModel, trunk: TrunkPart | PeftModel, directory: str | Path
) -> None:
    """Write the adapters of both parts as one adapter for `PeftModel.from_pretrained`.

    The adapter includes the head of a classifier. A part may be in a `PeftModel`.

    Args:
        client: The part with bottom and top.
        trunk: The part between them.
        directory: Where adapter_config.json and adapter_model.safetensors are written.

    Raises:
        ConfigError: Neither part has adapters, a part has several active ones, those of the two
            parts differ, or they are prompts.
        CheckpointError: The adapters are not of a kind that parts take.
    """
    tensors: dict[str, Tensor] = {}
    configs: list[LoraConfig] = []
    client, trunk = without_wrapper(client), without_wrapper(trunk)
    # A part trains the head without a wrapper of peft.
    modules = AdaptedModules(saved=client.plan.head)
    for label, part in (("client", client), ("trunk", trunk)):
        if adapter := active_adapter(part):
            configs.append(check_config(cast(Any, part.peft_config[adapter]), f"the {label}"))
            modules += AdaptedModules.of(part, adapter)
        for name, tensor in _adapter_state(part).items():
            tensors[_SAVED_PREFIX + name] = tensor.detach().contiguous()
    joined = shared_config(configs)
    modules.write_to(joined)
    joined.inference_mode = True
    joined.base_model_name_or_path = client.config.name_or_path or None
    joined.save_pretrained(str(directory))
    save_file(tensors, Path(directory) / _WEIGHTS, metadata={"format": "pt"})


def _config_for_whole(part: PreTrainedModel, lora: LoraSpec) -> tuple[LoraConfig, AdaptedModules]:
    """The peft config of `lora`, and the modules that it selects in the unsplit model."""
    family = _family_of(part)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_targets(part.config.model_type, lora.targets),
        task_type="CAUSAL_LM" if family.can_generate() else None,
    )
    try:
        tuned = _adapted_whole(part, config)
        if lora.targets != "auto":
            _refuse_unused(config, tuned)
    except (ValueError, TypeError, re.error) as exc:
        raise ConfigError(
            f"lora.targets={lora.targets} does not work for {family.__name__} "
            f"({_first_line(exc)}); name its linear layers, such as q_proj,v_proj"
        ) from exc
    return config, _resolved(part, tuned)


def _refuse_unused(config: LoraConfig, tuned: LoraModel) -> None:
    """Raise ValueError for a name in a list of targets that no module has; peft ignores it."""
    targets, found = config.target_modules, tuned.targeted_module_names
    for target in sorted(targets if isinstance(targets, set) else set[str]()):
        if not any(f".{name}".endswith(f".{target}") for name in found):
            raise ValueError(f"no module is called {target}")


def _adapted_whole(part: PreTrainedModel, config: LoraConfig) -> LoraModel:
    """The unsplit model on the meta device, with adapters; peft changes the config in place."""
    # peft resolves targets such as "all-linear" in a model, and a part has only some modules.
    whole = on_meta(_family_of(part), copy.deepcopy(part.config))
    # Conv1D stores its weight transposed; peft warns if the setting differs from the layer.
    config.fan_in_fan_out = any(isinstance(m, Conv1D) for m in whole.modules())
    with process_state(), _quiet():
        return LoraModel(whole, config, _ADAPTER, low_cpu_mem_usage=True)


def _resolved(part: PreTrainedModel, tuned: LoraModel) -> AdaptedModules:
    """The modules that `tuned` has adapters for, without the head that parts train in full."""
    plan = plan_for(_family_of(part), part.config)
    head = tuple(f"{module}." for module in plan.head)
    modules = AdaptedModules.of(tuned.model, _ADAPTER).only(
        lambda name: not f"{name}.".startswith(head)
    )
    for name in modules.saved:
        if f"{plan.blocks}.".startswith(f"{name}."):
            raise ValueError(f"modules_to_save has {name}, which is in both parts")
    return modules


def _targets(model_type: str, targets: str) -> list[str] | str:
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if targets == "auto":
        return list(known[model_type]) if model_type in known else "all-linear"
    names = [name.strip() for name in targets.split(",")]
    # Anything but names is for peft: "all-linear", or a regular expression.
    return names if all(re.fullmatch(r"[\w.]+", name) for name in names) else targets


def _first_line(exc: Exception) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0]


# Warnings of peft that do not apply here: it looks for its own rank patterns of fused experts among
# modules, corrects a setting for layers of the other kind, takes biases for pieces of weights, and
# expects users to merge into weights that are tied.
_NOT_HERE = (
    "Adapter .* LoRA tensor.s. have invalid shape",
    "The following (rank|alpha)_pattern keys",
    "fan_in_fan_out is set to",
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",
)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in _NOT_HERE:
            warnings.filterwarnings("ignore", message=message)
        yield
