"""Builders of the client's part, the trunk and the unsplit model, from files or from tensors."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from fedsplit.errors import CheckpointError, ConfigError, UnsupportedModel
from fedsplit.model.in_memory import identity_of, in_memory
from fedsplit.model.module_state import copy_state
from fedsplit.model.plan import model_class_for, plan_for
from fedsplit.model.quantization import (
    OPTION,
    as_whole,
    copy_plain,
    for_training,
    require_statistics,
)
from fedsplit.model.source import Source, on_meta
from fedsplit.model.stage import ClientPart, Part, TrunkPart, connect, part_class
from fedsplit.model.tensor_files import LazyTensor
from fedsplit.model.tensor_parallel import is_cut_by, require_shardable
from fedsplit.randomness import rng_scope
from fedsplit.spec import SplitSpec

P = TypeVar("P", bound=Part)
M = TypeVar("M", bound=PreTrainedModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitModel:
    """Both parts of a split model, connected in this process."""

    client: ClientPart
    trunk: TrunkPart


def build_client(
    config: PretrainedConfig,
    split: SplitSpec,
    *,
    source: str | None = None,
    state_dict: dict[str, Tensor] | None = None,
    model_class: type[PreTrainedModel] | None = None,
    revision: str = "main",
    seed: int = 0,
    **options: Any,
) -> ClientPart:
    """The client's part: bottom and top in one model; `connect` connects it to a trunk.

    Args:
        config: The unsplit model's config.
        split: The number of blocks in each part.
        source: Local directory or hub id of the unsplit model; only the part's tensors are read.
        state_dict: The tensors of the unsplit model or of the part; used without a copy.
        model_class: The family's class; by default the causal language model of `config`.
        revision: The branch, tag or commit of a hub id.
        seed: The seed of a classifier's head that the source does not have.
        options: For `from_pretrained`: dtype, attn_implementation, device_map, and a
            `BitsAndBytesConfig` as quantization_config.

    Raises:
        UnsupportedModel: The model cannot be cut exactly; raised before a file is read.
        ConfigError: The split does not fit, not exactly one of source and state_dict is given, or
            the package for the quantization is not installed.
        CheckpointError: A tensor is missing, has another shape, or cannot be read.
    """
    cls = _class_of(ClientPart, config, split, model_class)
    return _load(cls, config, source, state_dict, revision, options, seed)


def build_trunk(
    config: PretrainedConfig,
    split: SplitSpec,
    *,
    source: str | None = None,
    state_dict: dict[str, Tensor] | None = None,
    model_class: type[PreTrainedModel] | None = None,
    revision: str = "main",
    **options: Any,
) -> TrunkPart:
    """The trunk: the blocks between the cuts. Arguments and errors are those of `build_client`."""
    cls = _class_of(TrunkPart, config, split, model_class)
    return _load(cls, config, source, state_dict, revision, options)


def _class_of(
    kind: type[P],
    config: PretrainedConfig,
    split: SplitSpec,
    model_class: type[PreTrainedModel] | None,
) -> type[P]:
    family = model_class or model_class_for(config)
    plan = plan_for(family, config)
    trunk_blocks = range(*split.cut(plan.num_blocks, family.__name__))
    return part_class(kind, family, plan, trunk_blocks)


def _load(
    cls: type[P],
    config: PretrainedConfig,
    source: str | None,
    state_dict: dict[str, Tensor] | None,
    revision: str,
    options: dict[str, Any],
    seed: int = 0,
) -> P:
    if (source is None) == (state_dict is None):
        raise ConfigError(f"{cls.__name__}: give either source or state_dict")
    # transformers writes to the config of a model that it builds, so these models get a copy.
    whole = on_meta(cls.family, copy.deepcopy(config))
    config, options = as_whole(whole, config, cls.plan.head, options)
    if is_cut := is_cut_by(options):
        require_shardable(cls, config, options)
    if source is None:
        return load_tensors(cls, config, state_dict or {}, "state_dict", **options)
    origin = Source(name=source, revision=revision)
    # Not all at once what takes a fraction of its memory in the end.
    in_bits = OPTION in options
    own = on_meta(cls, copy.deepcopy(config))
    tensors = origin.tensors_of(own, lazily=is_cut or in_bits, mapped=in_bits)
    options = {"dtype": origin.dtype(config), **options}
    part = load_tensors(cls, config, tensors, source, new=cls.plan.head, seed=seed, **options)
    if in_bits:
        copy_plain(part)
    part.identity.update(origin.identity(config, whole, cls.plan.head))
    return _with_generation_config(part, origin)


def _with_generation_config(model: M, origin: Source) -> M:
    generation = origin.generation_config()
    if generation is not None and model.can_generate():
        model.generation_config = generation
    return model


def load_tensors(
    cls: type[M],
    config: PretrainedConfig,
    tensors: Mapping[str, Tensor | LazyTensor],
    origin: str,
    *,
    new: Sequence[str] = (),
    seed: int = 0,
    **options: Any,
) -> M:
    """A model of class `cls` with these tensors; errors name their source, `origin`.

    The tensors of the modules in `new` may be missing. They get random values from `seed`.

    Raises:
        CheckpointError: A tensor is missing or has another shape.
        UnsupportedModel: The family's loading separates tied tensors.
    """
    model, absent = _loaded(cls, config, tensors, origin, seed, options)
    may_miss = tuple(f"{module}." for module in new)
    missing = sorted(name for name in absent if not name.startswith(may_miss))
    if missing:
        raise CheckpointError(
            f"{origin}: tensor '{missing[0]}' of {cls.__name__} is missing "
            f"({len(missing)} missing, {len(tensors)} found)"
        )
    _require_ties(model)
    require_statistics(model, origin)
    for_training(model)
    return model


def _loaded(
    cls: type[M],
    config: PretrainedConfig,
    tensors: Mapping[str, Tensor | LazyTensor],
    origin: str,
    seed: int,
    options: dict[str, Any],
) -> tuple[M, list[str]]:
    """A model with these tensors, and the names of missing ones, which get random values."""
    if tensors and all(tensor.is_meta for tensor in tensors.values()):
        # `from_pretrained` would copy their values.
        without_values: Any = on_meta(cls, copy.deepcopy(config))
        without_values.tie_weights()
        return without_values.to(dtype=options.get("dtype")).eval(), []
    try:
        # `from_pretrained` replaces functions of the process, so it always takes the lock.
        with rng_scope(seed):
            loaded: Any = cls.from_pretrained(
                None, config=config, state_dict=dict(tensors), output_loading_info=True, **options
            )
    except RuntimeError as exc:
        reason = _misfit(cls, config, tensors) or f"{cls.__name__}: {str(exc).splitlines()[0]}"
        raise CheckpointError(f"{origin}: {reason}") from exc
    model, report = cast(tuple[M, dict[str, Any]], loaded)
    return model, list(report["missing_keys"])


def _require_ties(model: PreTrainedModel) -> None:
    """Raise if the family's loading has separated two tied tensors."""
    held = dict(model.named_parameters(remove_duplicate=False))
    for target, source in getattr(model, "ties", {}).items():
        # Equal values are not enough: a tied tensor sums the gradients of both uses.
        if held[target] is not held[source]:
            raise UnsupportedModel(
                f"{type(model).__name__}: its own loading unties '{target}' and '{source}', so a "
                "part cannot equal the unsplit model"
            )


def _misfit(
    cls: type[PreTrainedModel],
    config: PretrainedConfig,
    tensors: Mapping[str, Tensor | LazyTensor],
) -> str:
    """A sentence that names the first tensor with another shape than the model's; or empty."""
    held = on_meta(cls, copy.deepcopy(config)).state_dict()
    for name, tensor in tensors.items():
        if name in held and held[name].shape != tensor.shape:
            return (
                f"tensor '{name}' has shape {tuple(tensor.shape)}, but {cls.__name__} with this "
                f"config.json takes {tuple(held[name].shape)}"
            )
    return ""


def split_model(
    model: PreTrainedModel | str,
    split: SplitSpec | str = "1/2/1",
    *,
    config: PretrainedConfig | None = None,
    model_class: type[PreTrainedModel] | None = None,
    revision: str = "main",
    seed: int = 0,
    **options: Any,
) -> SplitModel:
    """Cut a model into the client's part and the trunk, connected in this process.

    The parts give the same logits, gradients and generated tokens as the unsplit model. Those of a
    model in memory have its mode, its settings (such as activation checkpointing) and its frozen
    parameters; its hooks stay behind, with a warning.

    Args:
        model: A model in memory (its tensors are copied), a local directory or a hub id.
        split: Blocks of bottom, trunk and top, such as "1/2/1" or "1/*/1".
        config: A config that replaces the one of the directory or hub id.
        model_class: As in `build_client`.
        revision: The branch, tag or commit of a hub id.
        seed: As in `build_client`.
        options: As in `build_client`.

    Raises:
        UnsupportedModel: The model cannot be cut exactly; raised before its weights are read.
        ConfigError: The split does not fit.
        CheckpointError: The source is not a model, or a tensor is missing.

    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> config = GPT2Config(n_layer=4, n_embd=8, n_head=2, vocab_size=32, n_positions=16)
    >>> whole = GPT2LMHeadModel(config).eval()
    >>> parts = split_model(whole, "1/2/1")
    >>> ids = torch.arange(10).reshape(2, 5)
    >>> torch.equal(parts.client(ids).logits, whole(ids).logits)
    True
    >>> parts.client(ids, labels=ids).loss.backward()
    >>> sorted({name.split(".")[2] for name, _ in parts.trunk.named_parameters()})
    ['1', '2']
    """
    spec = SplitSpec.parse(split) if isinstance(split, str) else split
    if isinstance(model, str):
        config = config or Source(name=model, revision=revision).config()
        origin: dict[str, Any] = {"source": model, "revision": revision, "model_class": model_class}
    else:
        config, origin = in_memory(model, model_class)
    client = build_client(config, spec, seed=seed, **{**origin, **options})
    trunk = build_trunk(config, spec, **{**origin, **options})
    if isinstance(model, PreTrainedModel):
        identity = identity_of(model, client.plan.head)
        for part in (client, trunk):
            copy_state(model, part, dtypes="dtype" not in options)
            for_training(part)
            part.identity.update(identity)
    connect(client, trunk.run, trunk.new_cache)
    return SplitModel(client=client, trunk=trunk)


def load_whole(
    config: PretrainedConfig,
    source: str,
    *,
    model_class: type[PreTrainedModel],
    revision: str = "main",
    seed: int = 0,
    **options: Any,
) -> PreTrainedModel:
    """The unsplit model of a local directory or a hub id; it need not be one that can be cut.

    Weights may be missing, as in transformers: they get random values from `seed`, and transformers
    logs a warning with their names. The other arguments are those of `build_client`.

    Raises:
        CheckpointError: A tensor has another shape, or cannot be read.
    """
    origin = Source(name=source, revision=revision)
    tensors = origin.tensors_of(on_meta(model_class, copy.deepcopy(config)))
    options = {"dtype": origin.dtype(config), **options}
    whole, _ = _loaded(model_class, config, tensors, source, seed, options)
    return _with_generation_config(whole, origin)


def initial_parts(
    config: PretrainedConfig,
    split: SplitSpec,
    seed: int,
    *,
    model_class: type[PreTrainedModel] | None = None,
    **options: Any,
) -> SplitModel:
    """The two parts of `initial_whole`; the unsplit model is in memory while they are made.

    Raises:
        UnsupportedModel: The model cannot be cut exactly; raised before it is built.
    """
    plan_for(model_class or model_class_for(config), config)
    whole = initial_whole(config, seed, model_class=model_class, **options)
    # As a model is that was loaded; training sets the mode itself.
    return split_model(whole.eval(), split)


def initial_whole(
    config: PretrainedConfig,
    seed: int,
    *,
    model_class: type[PreTrainedModel] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The unsplit model with the random weights that it gets under `torch.manual_seed(seed)`.

    The caller's random state does not change.
    """
    family = model_class or model_class_for(config)
    # Parts that draw their own weights would not be parts of one model: the order differs.
    with rng_scope(seed):
        whole: PreTrainedModel = family._from_config(copy.deepcopy(config), **options)
    return whole
