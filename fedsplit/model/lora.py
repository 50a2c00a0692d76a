"""Low-rank adapters on the parts of a model, and the parameters that train.

The targets are those that peft selects on the unsplit model, so the adapters of all parts form one
ordinary peft adapter of that model. A classifier's head trains in full, as with peft's
`modules_to_save`, because it is often new. (Hu et al. 2021, "LoRA", arXiv 2106.09685.)
"""

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, LoraModel, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedsplit.errors import CheckpointError, ConfigError
from fedsplit.model.plan import plan_for
from fedsplit.model.source import Source, on_meta, read_tensors, tensor_names
from fedsplit.model.stage import AUXILIARY, ClientPart, Part, TrunkPart
from fedsplit.randomness import process_state, rng_scope
from fedsplit.spec import LoraSpec

# Names that peft fixes: of the adapter, of a wrapped layer, and of tensors and files on disk.
_ADAPTER = "default"
_BASE = ".base_layer"
_SAVED_PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


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
        ConfigError: The targets match no module that can have an adapter.
    """
    if not lora.enabled:
        return
    _inject(part, _config_for_whole(part, lora), lora, seed)


def load_adapter(part: PreTrainedModel, source: str, revision: str = "main") -> None:
    """Freeze the part and load its share of a peft adapter of the unsplit model, ready to train.

    Args:
        part: Client, trunk, or the unsplit model; changed in place.
        source: Directory or hub id with adapter_config.json and adapter_model.safetensors, as
            `save_adapter` and peft write them.
        revision: The branch, tag or commit of a hub id.

    Raises:
        CheckpointError: The source is not a LoRA adapter of this model, or it holds tensors other
            than adapters and a classifier's head.
    """
    origin = Source(name=source, revision=revision)
    config = _saved_config(origin)
    try:
        _inject(part, _resolved_config(part, config), LoraSpec(), seed=0)
    except (ValueError, TypeError) as exc:
        raise CheckpointError(
            f"{source}: not an adapter of {_family_of(part).__name__} ({_first_line(exc)})"
        ) from exc
    own = _adapter_state(part)
    file = origin.file(_WEIGHTS)
    saved = {n.removeprefix(_SAVED_PREFIX): n for n in tensor_names(file) if _is_of(part, n)}
    if unmatched := sorted(own.keys() ^ saved.keys()):
        problem = "is missing" if unmatched[0] in own else "does not exist in this model"
        raise CheckpointError(f"{source}: tensor '{unmatched[0]}' {problem}")
    for name, tensor in read_tensors(file, list(saved.values())).items():
        target = own[name.removeprefix(_SAVED_PREFIX)]
        if target.shape != tensor.shape:
            raise CheckpointError(
                f"{source}: tensor '{name}' has shape {tuple(tensor.shape)}, but this model takes "
                f"{tuple(target.shape)}"
            )
        target.copy_(tensor)


def _saved_config(origin: Source) -> LoraConfig:
    try:
        config = LoraConfig(**json.loads(origin.file(_CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as exc:
        raise CheckpointError(
            f"{origin.name}: {_CONFIG} does not describe a LoRA adapter ({_first_line(exc)})"
        ) from exc
    # A saved adapter is in inference mode, in which peft freezes it.
    config.inference_mode = False
    # peft would wrap these modules; a part trains its own head.
    config.modules_to_save = None
    return config


def _adapter_state(part: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of the part's adapters and head, by name in a saved adapter; not copied."""
    adapters: dict[str, Tensor] = {}
    if _adapted(part):
        # "auto" would look up the base model on the hub to compare vocabulary sizes.
        adapters = get_peft_model_state_dict(
            part, adapter_name=_ADAPTER, save_embedding_layers=False
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


def _inject(part: PreTrainedModel, config: LoraConfig, lora: LoraSpec, seed: int) -> None:
    """Freeze the part; add adapters to the targets that the part holds and `lora` enables."""
    part.requires_grad_(False)
    for field in ("target_modules", "target_parameters"):
        setattr(config, field, [n for n in getattr(config, field) if _gets_adapter(part, n, lora)])
    if config.target_modules or config.target_parameters:
        with rng_scope(seed), _quiet_about_experts():
            inject_adapter_in_model(config, part, _ADAPTER)
        # New modules are in training mode, even if the part is not.
        part.train(part.training)
    for name in plan_for(_family_of(part), part.config).head:
        part.get_submodule(name).requires_grad_(True)


def _gets_adapter(part: PreTrainedModel, module: str, lora: LoraSpec) -> bool:
    if not isinstance(part, Part):
        return True
    is_enabled = {"bottom": lora.bottom, "trunk": lora.trunk, "top": lora.top}
    return part.holds(module) and is_enabled[part.place_of(module)]


def _family_of(part: PreTrainedModel) -> type[PreTrainedModel]:
    return part.family if isinstance(part, Part) else type(part)


def share_frozen(part: PreTrainedModel, other: PreTrainedModel) -> None:
    """Replace the frozen tensors of a part by equal tensors of another part, to save memory.

    Args:
        part: A part of the same model, which may have other adapters; changed in place.
        other: The part that keeps its tensors.
    """
    # An adapter adds `base_layer` to the name of the weight that it wraps.
    others = {
        name.replace(_BASE, ""): parameter
        for name, parameter in other.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }
    # A list, since the loop changes what is iterated; tied parameters under all of their names.
    for name, own in list(part.named_parameters(remove_duplicate=False)):
        same = others.get(name.replace(_BASE, ""))
        if same is not None and not own.requires_grad and torch.equal(own, same):
            module, _, leaf = name.rpartition(".")
            part.get_submodule(module)._parameters[leaf] = same


def trainable(part: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; tied ones once."""
    return {name: p for name, p in part.named_parameters() if p.requires_grad}


def save_adapter(client: ClientPart, trunk: TrunkPart, directory: str | Path) -> None:
    """Write the adapters of both parts as one adapter for `PeftModel.from_pretrained`.

    The adapter includes the head of a classifier.

    Args:
        client: The part with bottom and top.
        trunk: The part between them.
        directory: Where adapter_config.json and adapter_model.safetensors are written.

    Raises:
        ConfigError: Neither part has adapters.
    """
    tensors: dict[str, Tensor] = {}
    configs: list[LoraConfig] = []
    for part in (client, trunk):
        if not _adapted(part):
            continue
        configs.append(cast(LoraConfig, part.peft_config[_ADAPTER]))
        for name, tensor in get_peft_model_state_dict(part, adapter_name=_ADAPTER).items():
            tensors[_SAVED_PREFIX + name] = tensor.detach().contiguous()
    if not configs:
        raise ConfigError("neither client nor trunk has adapters to save; set lora.enabled=true")
    # The configs differ in their targets only, since both parts have the same LoRA settings.
    joined = copy.deepcopy(configs[0])
    joined.target_modules = sorted(n for c in configs for n in c.target_modules or ())
    joined.target_parameters = sorted(n for c in configs for n in c.target_parameters or ())
    for head in client.plan.head:
        for name, tensor in client.get_submodule(head).state_dict(prefix=f"{head}.").items():
            tensors[_SAVED_PREFIX + name] = tensor.detach().contiguous()
    joined.modules_to_save = list(client.plan.head) or None
    joined.inference_mode = True
    joined.base_model_name_or_path = client.config.name_or_path or None
    joined.save_pretrained(str(directory))
    save_file(tensors, Path(directory) / _WEIGHTS, metadata={"format": "pt"})


def folded_state(part: PreTrainedModel) -> dict[str, Tensor]:
    """The part's tensors by the unsplit model's names, with adapters merged into the weights.

    An auxiliary head is left out, since the unsplit model has none.
    """
    state = {
        name.replace(_BASE, ""): tensor
        for name, tensor in part.state_dict().items()
        if f".{_ADAPTER}." not in name and not name.startswith(f"{AUXILIARY}.")
    }
    for name, layer in _adapted(part).items():
        # An adapter of fused experts changes a parameter of its own name instead of `weight`.
        weight = f"{name.replace(_BASE, '')}.{getattr(layer, 'parameter_name', 'weight')}"
        state[weight] = state[weight] + cast(Any, layer).get_delta_weight(_ADAPTER)
    return state


def _adapted(part: PreTrainedModel) -> dict[str, LoraLayer]:
    return {name: m for name, m in part.named_modules() if isinstance(m, LoraLayer)}


def _config_for_whole(part: PreTrainedModel, lora: LoraSpec) -> LoraConfig:
    """The peft config of `lora` for the unsplit model, with the full name of every target."""
    family = _family_of(part)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_targets(part.config.model_type, lora.targets),
        task_type="CAUSAL_LM" if family.can_generate() else None,
    )
    try:
        return _resolved_config(part, config)
    except (ValueError, TypeError) as exc:
        raise ConfigError(
            f"lora.targets={lora.targets} does not work for {family.__name__} "
            f"({_first_line(exc)}); name its linear layers, such as q_proj,v_proj"
        ) from exc


def _resolved_config(part: PreTrainedModel, config: LoraConfig) -> LoraConfig:
    """The config, changed in place, with the full names of its targets in the unsplit model."""
    family = _family_of(part)
    # peft resolves targets such as "all-linear" in a model, and a part has only some modules.
    whole = on_meta(family, copy.deepcopy(part.config))
    # Conv1D stores its weight transposed; peft warns if the setting differs from the layer.
    config.fan_in_fan_out = any(isinstance(m, Conv1D) for m in whole.modules())
    with process_state(), _quiet_about_experts():
        tuned = LoraModel(whole, config, _ADAPTER, low_cpu_mem_usage=True)
    head = tuple(f"{module}." for module in plan_for(family, part.config).head)
    config.target_modules = [
        name for name in tuned.targeted_module_names if not f"{name}.".startswith(head)
    ]
    config.target_parameters = list(tuned.targeted_parameter_names)
    return config


def _targets(model_type: str, targets: str) -> list[str] | str:
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if targets != "auto":
        return [name.strip() for name in targets.split(",")]
    return list(known[model_type]) if model_type in known else "all-linear"


def _first_line(exc: Exception) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0]


@contextmanager
def _quiet_about_experts() -> Iterator[None]:
    # peft sets rank patterns for fused experts, which are parameters, and then warns that no
    # module matches them.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
        yield
