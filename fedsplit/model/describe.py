"""The model that a run describes: its config and its initial parts."""

import difflib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    TokenizersBackend,
)

from fedsplit.errors import ConfigError, peer_text
from fedsplit.model.acceleration import precision_of
from fedsplit.model.attention import attention_of
from fedsplit.model.auxiliary import add_auxiliary_head
from fedsplit.model.build import (
    SplitModel,
    build_client,
    build_trunk,
    initial_whole,
    load_whole,
)
from fedsplit.model.config_sizes import MAX_BLOCKS, building, too_small
from fedsplit.model.lora import add_adapters, trainable
from fedsplit.model.plan import classifier_fields, model_class_for, plan_for
from fedsplit.model.quantization import quantization_of, settings_of
from fedsplit.model.source import Source
from fedsplit.model.stage import ClientPart, TrunkPart, connect
from fedsplit.model.tensor_parallel import sharding
from fedsplit.model.trunkless import without_trunk
from fedsplit.spec import ModelSpec, RunSpec

log = logging.getLogger(__name__)

_BLOCKS = "num_hidden_layers"


def config_of(
    run: RunSpec, tokenizer: TokenizersBackend | None, labels: tuple[str, ...] = ()
) -> PretrainedConfig:
    """The config of the run's checkpoint, or of a new model of its family.

    Args:
        run: Names the checkpoint or the family.
        tokenizer: Sets vocabulary size and special tokens of a new model; None for images.
        labels: The names of the classes of a classifier.

    Raises:
        ConfigError: transformers does not know the family, or it refuses the settings.
        CheckpointError: The checkpoint has no readable config.
    """
    model, pad = run.model, tokenizer.pad_token_id if tokenizer else None
    classes = classifier_fields(labels, pad) if labels else {}
    if model.pretrained:
        config = Source(name=model.pretrained, revision=model.revision).config()
        config.update(classes)
        return config
    if model.family not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model.family, list(CONFIG_MAPPING), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"model.family={model.family} is not a model type of transformers{hint}")
    _require_few_blocks(model)
    # The user's own fields come last, so that they override all others.
    fields = {**(_ids_of(tokenizer) if tokenizer else {}), **classes, **model.config}
    try:
        config = AutoConfig.for_model(model.family, **fields)
    except (ValueError, TypeError, ArithmeticError, StrictDataclassError) as exc:
        sizes = too_small(model.config)
        hint = f" (model.config has {sizes}; sizes are at least 1)" if sizes else ""
        raise ConfigError(f"model.family={model.family}: {peer_text(str(exc))}{hint}") from exc
    return config


def _require_few_blocks(model: ModelSpec) -> None:
    alias = CONFIG_MAPPING[model.family].attribute_map.get(_BLOCKS, _BLOCKS)
    for name in (_BLOCKS, alias):
        blocks = model.config.get(name, 0)
        if isinstance(blocks, int) and blocks > MAX_BLOCKS:
            raise ConfigError(
                f"model.config.{name}={blocks} is too large; a new model has at most {MAX_BLOCKS} "
                "blocks"
            )


def parts_of(run: RunSpec, config: PretrainedConfig, device: str = "cpu") -> SplitModel:
    """Both parts of the run before training, connected in this process.

    Raises:
        ConfigError: The checkpoint's weights are quantized, and the run would train them in full.
    """
    _require_adapters(run, config)
    options = _options(run, config, device)
    # Before the weights of a new model, which take memory and time.
    bits = [_bits(run, kind) for kind in (run.model.quantize_client, run.model.quantize)]
    weights = _weights(run, config, options)
    client = _client(run, config, {**weights, **bits[0]})
    trunk = _trunk(run, config, {**weights, **bits[1]})
    connect(client, trunk.run, trunk.new_cache)
    return SplitModel(client=client, trunk=trunk)


def client_of(run: RunSpec, config: PretrainedConfig, device: str = "cpu") -> ClientPart:
    """The client's part before training, with adapters if the run trains them.

    Only the part's own tensors are read from a checkpoint.

    Args:
        run: Names the checkpoint or the family, the split, the adapters and the seed.
        config: The unsplit model's config, from `config_of`.
        device: Where the part will compute; it selects attention and precision. The part itself
            is in host memory.
    """
    bits = _bits(run, run.model.quantize_client)
    return _client(run, config, {**_weights(run, config, _options(run, config, device)), **bits})


def trunk_of(
    run: RunSpec, config: PretrainedConfig, device: str = "cpu", *, ranks: int = 1
) -> TrunkPart:
    """The trunk before training; it is frozen unless the run's mode is `joint`.

    With several `ranks`, all of them call this, and each gets its shard.
    """
    bits = _bits(run, run.model.quantize)
    weights = _weights(run, config, _options(run, config, device))
    return _trunk(run, config, {**weights, **bits, **sharding(ranks)})


def whole_of(run: RunSpec, config: PretrainedConfig, device: str = "cpu") -> PreTrainedModel:
    """The unsplit model before training, for a baseline.

    Raises:
        ConfigError: As in `parts_of`.
    """
    _require_adapters(run, config)
    options = _options(run, config, device)
    if run.baseline == "no_trunk":
        weights = _weights(run, config, options)
        client = build_client(config, run.split, seed=run.seed, **weights)
        whole = without_trunk(
            client, dtype=client.dtype, attn_implementation=weights["attn_implementation"]
        )
    elif run.model.pretrained:
        source, revision = run.model.pretrained, run.model.revision
        whole = load_whole(config, source, revision=revision, seed=run.seed, **options)
    else:
        with building(config):
            whole = initial_whole(config, run.seed, **options)
    add_adapters(whole, run.lora, run.seed)
    return whole


def shared(model: PreTrainedModel, run: RunSpec) -> dict[str, nn.Parameter]:
    """The trained parameters that a client sends to the server for aggregation, by name."""
    names = set(_personal_names(model, run))
    return {name: p for name, p in trainable(model).items() if name not in names}


def personal(model: PreTrainedModel, run: RunSpec) -> dict[str, nn.Parameter]:
    """The trained parameters that stay at the client, by name."""
    names = set(_personal_names(model, run))
    return {name: p for name, p in trainable(model).items() if name in names}


def _personal_names(model: PreTrainedModel, run: RunSpec) -> Iterator[str]:
    for name in trainable(model):
        if run.baseline == "local":
            yield name
        elif isinstance(model, ClientPart):
            if run.client_weights.is_personal(model.place_of(name.rpartition(".")[0])):
                yield name


def _ids_of(tokenizer: TokenizersBackend) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _options(run: RunSpec, config: PretrainedConfig, device: str) -> dict[str, Any]:
    """The model's class, dtype and attention implementation, as options for the builders."""
    family = model_class_for(config, run.task)
    attention = attention_of(run.model, family, device)
    precision = precision_of(run.model, _device(device)) or run.model.dtype
    values = family.__name__, device, attention, precision
    log.info("%s on %s computes attention as %s, matrix products in %s", *values)
    dtype = getattr(torch, run.model.dtype)
    return {"model_class": family, "dtype": dtype, "attn_implementation": attention}


def _bits(run: RunSpec, kind: str) -> dict[str, Any]:
    """The option by which the builders quantize a part; empty if they do not."""
    return dict(settings_of(kind, getattr(torch, run.model.dtype)))


def _require_adapters(run: RunSpec, config: PretrainedConfig) -> None:
    if (method := quantization_of(config)) and not run.lora.enabled:
        raise ConfigError(
            f"the weights of {run.model} are quantized ({method}), and lora.enabled=false trains "
            "them in full; set lora.enabled=true, or start from plain weights"
        )


def _weights(run: RunSpec, config: PretrainedConfig, options: dict[str, Any]) -> dict[str, Any]:
    """`options` with the source of the weights: a checkpoint, or the tensors of a new model."""
    if run.model.pretrained:
        return {"source": run.model.pretrained, "revision": run.model.revision, **options}
    # Refuses a model that cannot be cut before it takes memory.
    plan_for(options["model_class"], config)
    return {"state_dict": initial_whole(config, run.seed, **options).state_dict(), **options}


def _client(run: RunSpec, config: PretrainedConfig, weights: dict[str, Any]) -> ClientPart:
    client = build_client(config, run.split, seed=run.seed, **weights)
    add_adapters(client, run.lora, run.seed)
    # After the adapters, which freeze all parameters that exist.
    if run.train.mode == "isolated":
        add_auxiliary_head(client, run.task, run.seed)
    return client


def _trunk(run: RunSpec, config: PretrainedConfig, weights: dict[str, Any]) -> TrunkPart:
    trunk = build_trunk(config, run.split, **weights)
    add_adapters(trunk, run.lora, run.seed)
    # After the adapters, which would train. Without them, a norm beside quantized layers would.
    is_quantized = bool(quantization_of(trunk.config))
    if run.train.mode != "joint" or (is_quantized and not run.lora.enabled):
        trunk.requires_grad_(False)
    return trunk


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as exc:
        raise ConfigError(f"device={name} cannot be used: {str(exc).splitlines()[0]}") from exc
