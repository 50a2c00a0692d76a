"""The plan of a cut: a model's blocks and the modules around them, or why it cannot be cut."""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from fedsplit.data.tasks import TASKS
from fedsplit.errors import ConfigError, UnsupportedModel
from fedsplit.model.config_sizes import building
from fedsplit.model.dryrun import FAMILY_ERRORS, Journal, observe
from fedsplit.model.quantization import require_readable
from fedsplit.model.rope import remove_lengths
from fedsplit.randomness import process_state


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The assignment of a model's modules to parts; names are those of the unsplit model.

    All other modules have no weights (rotary tables, ALiBi) and are in every part.

    Attributes:
        backbone: The module that the trunk calls: it turns embeddings into hidden states
            ("" for the model itself).
        blocks: The list of blocks.
        num_blocks: The number of blocks.
        before: Modules that only the bottom holds: embeddings and others that run before blocks.
        after: Modules that only the top holds: the last norm and the head.
        returns_tuple: Whether a block returns a tuple whose first item is the hidden states.
        trunk_input: The backbone's argument for a placeholder of the smashed data's shape.
        head: A classifier's modules with weights outside its backbone. A checkpoint for another
            task does not have them.
    """

    backbone: str
    blocks: str
    num_blocks: int
    before: tuple[str, ...]
    after: tuple[str, ...]
    returns_tuple: bool
    trunk_input: str
    head: tuple[str, ...]


# Config fields that connect blocks in a way that a cut would sever, with the reason.
_REFUSED_FIELDS = {
    "is_encoder_decoder": "encoder-decoder",
    "output_router_logits": (
        "output_router_logits=True: the auxiliary loss needs the router logits of layers the "
        "client does not hold"
    ),
    "layerdrop": "layerdrop > 0 would drop the boundary itself; set it to 0",
    "decoder_layerdrop": "decoder_layerdrop > 0 would drop the boundary itself; set it to 0",
    "num_kv_shared_layers": (
        "num_kv_shared_layers={value}: layers share keys and values across the cut"
    ),
}


def model_class_for(config: PretrainedConfig, task: str = "causal_lm") -> type[PreTrainedModel]:
    """The model class of a config, with the head for a task of `RunSpec`.

    Raises:
        UnsupportedModel: transformers has no such class.
    """
    entry: Any = TASKS[task].model_classes.get(type(config), None)
    if entry is None:
        raise UnsupportedModel(
            f"{type(config).__name__}: transformers has no {TASKS[task].head} model for model type "
            f"'{config.model_type}'; set another task, or pass model_class"
        )
    # For a few configs, transformers maps to several classes, the usual one first.
    family: type[PreTrainedModel] = entry[0] if isinstance(entry, (tuple, list)) else entry
    return family


def classifier_fields(labels: Sequence[str], pad_token_id: int | None = None) -> dict[str, Any]:
    """The config fields of a classifier for these classes.

    Args:
        labels: The names of the classes, in the order of their numbers.
        pad_token_id: The tokenizer's padding token, None for images. Decoders classify by the last
            token that is not padding.

    Raises:
        ConfigError: There are fewer than two classes.
    """
    if len(labels) < 2:
        found = ", ".join(labels) or "none"
        raise ConfigError(
            f"a classifier needs at least 2 classes, but the data has: {found}; set data.label to "
            "the field that tells them apart"
        )
    fields = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
        "problem_type": "single_label_classification",
    }
    return fields if pad_token_id is None else {**fields, "pad_token_id": pad_token_id}


def plan_for(model_class: type[PreTrainedModel], config: PretrainedConfig) -> Plan:
    """The plan of a cut of `model_class` with `config`, from a dry run without weights.

    The plan is cached by class and config.

    Raises:
        UnsupportedModel: The model cannot be cut exactly; names the class and the cause.
    """
    text: str = config.to_json_string(use_diff=False)
    return _plan(_PlanKey(model_class=model_class, text=text, config=config))


@dataclass(frozen=True, slots=True, kw_only=True)
class _PlanKey:
    """The key of a cached plan. A config has no hash, so its text is compared."""

    model_class: type[PreTrainedModel]
    text: str
    config: PretrainedConfig = field(compare=False)


@lru_cache(maxsize=64)
def _plan(key: _PlanKey) -> Plan:
    # The dry run changes the config, and this one is the caller's.
    family, config = key.model_class, copy.deepcopy(key.config)
    try:
        _refuse_by_config(family, config)
        # On the meta device, a caller's default, the constants of some families would not be fake.
        with process_state(), torch.device("cpu"), FakeTensorMode():
            return _trace(_weightless(family, config))
    except UnsupportedModel as exc:
        raise UnsupportedModel(f"{family.__name__}: {exc}") from exc.__cause__


def _refuse_by_config(family: type[PreTrainedModel], config: PretrainedConfig) -> None:
    for name, reason in _REFUSED_FIELDS.items():
        value = getattr(config, name, None)
        if value:
            raise UnsupportedModel(reason.format(value=value))
    require_readable(config)
    # A stateful model is fine if its state is in an ordinary KV cache.
    if (
        family._is_stateful
        and "past_key_values" not in inspect.signature(family.forward).parameters
    ):
        raise UnsupportedModel("keeps its state in a cache of its own kind")


def _weightless(family: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    # In the dry run, a tied head would be marked as a reader of the embeddings. `Part` checks ties.
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
    config.output_attentions = False  # a probe has none to return
    remove_lengths(config)
    with no_init_weights(), building(config):
        model: PreTrainedModel = family(config).eval()
    return model


def _trace(model: PreTrainedModel) -> Plan:
    name, blocks = _find_blocks(model)
    spine = _spine(model, name)
    beside = {
        child_name: child
        for parent in spine
        for child_name, child in _children(model, parent)
        if child_name != name and child_name not in spine
    }
    returns_tuple, journal = _rehearse(model, blocks, beside)
    if journal.faults:
        raise UnsupportedModel("; ".join(sorted(set(journal.faults))[:3]))
    before, after = _sort(beside, journal)
    prefix = model.base_model_prefix
    backbone = prefix if name.startswith(f"{prefix}.") else ""
    return Plan(
        backbone=backbone,
        blocks=name,
        num_blocks=len(blocks),
        before=before,
        after=after,
        returns_tuple=returns_tuple,
        trunk_input=_trunk_input(model),
        head=_head(model, backbone, after),
    )


def _find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name and the list of the model's blocks: the one list of `num_hidden_layers` modules."""
    text_config = model.config.get_text_config(decoder=True)
    count = getattr(text_config, "num_hidden_layers", None)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and count and len(module) == count
    }
    # A block may have such a list itself, such as one of experts.
    outermost = {
        name: module
        for name, module in found.items()
        if not any(name.startswith(f"{other}.") for other in found)
    }
    # Among several lists, take the one whose modules the family keeps on one device.
    unsplittable = set(model._no_split_modules or ())
    listed = {n: m for n, m in outermost.items() if type(m[0]).__name__ in unsplittable}
    candidates = listed or outermost
    if len(candidates) != 1:
        raise UnsupportedModel(
            f"expected one ModuleList of {count} layers, found {list(candidates)}; "
            "its layers cannot be told apart"
        )
    return next(iter(candidates.items()))


def _spine(model: PreTrainedModel, blocks_name: str) -> list[str]:
    """The names of the modules from the model ("") down to the parent of its blocks."""
    pieces = blocks_name.split(".")[:-1]
    spine = ["", *(".".join(pieces[: i + 1]) for i in range(len(pieces)))]
    for name in spine:
        # A part keeps these modules, so it could not leave their own weights out.
        own = [key for key, _ in model.get_submodule(name).named_parameters(recurse=False)]
        if own:
            raise UnsupportedModel(
                f"weights {own} sit directly on '{name or 'model'}', outside any sub-module"
            )
    return spine


def _children(model: nn.Module, parent: str) -> list[tuple[str, nn.Module]]:
    prefix = f"{parent}." if parent else ""
    return [(prefix + name, child) for name, child in model.get_submodule(parent).named_children()]


def _rehearse(
    model: PreTrainedModel, blocks: nn.ModuleList, beside: dict[str, nn.Module]
) -> tuple[bool, Journal]:
    """Whether blocks return tuples, and the record of the dry run that shows it.

    No attribute of a family tells this, so both forms are tried. Of the wrong one the family takes
    the first item: a sequence of the batch, which the shapes show.
    """
    failure: Exception | None = None
    journal: Journal | None = None
    for returns_tuple in (False, True):
        try:
            journal = observe(model, blocks, beside, _inputs(model), returns_tuple)
        except FAMILY_ERRORS as exc:
            # The first failure is reported: most families return tensors.
            failure = failure or exc
            continue
        if journal.is_chain:
            return returns_tuple, journal
    if failure is not None:
        first_line = f"{type(failure).__name__}: {failure}".splitlines()[0]
        raise UnsupportedModel(f"dry run failed ({first_line})") from failure
    shapes = journal.shapes if journal else []
    raise UnsupportedModel(
        "layers do not map hidden states to hidden states one after the other "
        f"(shapes {shapes[:3]}, {len(shapes)} calls for {len(blocks)} layers)"
    )


def _inputs(model: PreTrainedModel) -> dict[str, Any]:
    """A small batch for a dry run: two rows, so that a wrongly indexed batch changes its shape."""
    config = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.zeros(2, config.num_channels, height, width)}
    ids = {model.main_input_name: torch.zeros(2, 6, dtype=torch.long)}
    return {**ids, "use_cache": False} if hasattr(config, "use_cache") else ids


def _trunk_input(model: PreTrainedModel) -> str:
    takes_embeds = model.main_input_name == "input_ids"
    return "inputs_embeds" if takes_embeds else str(model.main_input_name)


def _head(model: PreTrainedModel, backbone: str, after: tuple[str, ...]) -> tuple[str, ...]:
    if not (backbone and type(model).__name__.endswith("Classification")):
        return ()
    outside = (name for name in after if not name.startswith(f"{backbone}."))
    return tuple(name for name in outside if _has_weights(model.get_submodule(name)))


def _has_weights(module: nn.Module) -> bool:
    return bool(module.state_dict()) or any(True for _ in module.parameters())


def _sort(
    beside: dict[str, nn.Module], journal: Journal
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The modules that belong to the bottom and to the top."""
    before, after = [], []
    for name, module in beside.items():
        phases = journal.ran.get(name, set())
        has_weights = _has_weights(module)
        if "between" in phases:
            raise UnsupportedModel(f"'{name}' runs between layers")
        if has_weights and not phases:
            raise UnsupportedModel(
                f"'{name}' has weights but never ran in the dry run; if it serves another kind "
                "of input, cut the text model's class with its text config"
            )
        if has_weights and len(phases) > 1:
            raise UnsupportedModel(f"'{name}' runs both before and after the layers")
        # A dropout before the blocks must run in the bottom only. In another part it would draw
        # random numbers and so change those of the part's blocks.
        if phases == {"before"} and (has_weights or isinstance(module, nn.Dropout)):
            before.append(name)
        elif phases == {"after"}:
            after.append(name)
    return tuple(before), tuple(after)
