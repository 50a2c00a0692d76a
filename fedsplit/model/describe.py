"""The model that a run describes: its config, and the parts that each side starts from."""

import difflib
import threading
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, TokenizersBackend

from fedsplit.errors import ConfigError
from fedsplit.model.hollow import ClientPart
from fedsplit.model.lora import add_adapters
from fedsplit.model.parts import SplitModel, build_client, initial_parts, split_model
from fedsplit.model.source import Source
from fedsplit.spec import ModelSpec, RunSpec

# transformers builds models under settings of the whole process (device, initialization).
_ONE_AT_A_TIME = threading.Lock()


def config_of(model: ModelSpec, tokenizer: TokenizersBackend) -> PretrainedConfig:
    """The config of the checkpoint, or of a new model of the family for this tokenizer.

    Raises:
        ConfigError: transformers knows no such family, or it refuses the settings.
        CheckpointError: The checkpoint has no config that can be read.
    """
    if model.pretrained:
        return Source(name=model.pretrained, revision=model.revision).config()
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if model.family not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model.family, list(CONFIG_MAPPING), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"model.family={model.family} is not a model type of transformers{hint}")
    try:
        config: PretrainedConfig = AutoConfig.for_model(model.family, **{**ids, **model.config})
    except (ValueError, TypeError) as exc:
        raise ConfigError(f"model.family={model.family}: {str(exc).splitlines()[0]}") from exc
    return config


def parts_of(run: RunSpec, config: PretrainedConfig) -> SplitModel:
    """Both parts as the run begins, with adapters if it trains those."""
    with _ONE_AT_A_TIME:
        return _parts(run, config)


def client_of(run: RunSpec, config: PretrainedConfig) -> ClientPart:
    """The client's part as the run begins; of a checkpoint, only its own tensors are read."""
    with _ONE_AT_A_TIME:
        return _client(run, config)


def _parts(run: RunSpec, config: PretrainedConfig) -> SplitModel:
    if run.model.pretrained:
        source, revision = run.model.pretrained, run.model.revision
        parts = split_model(source, run.split, revision=revision, **_options(run.model))
    else:
        parts = initial_parts(config, run.split, run.seed, **_options(run.model))
    for part in (parts.client, parts.trunk):
        add_adapters(part, run.lora, run.seed)
    return parts


def _client(run: RunSpec, config: PretrainedConfig) -> ClientPart:
    if not run.model.pretrained:
        return _parts(run, config).client
    source, revision = run.model.pretrained, run.model.revision
    options = _options(run.model)
    client = build_client(config, run.split, source=source, revision=revision, **options)
    add_adapters(client, run.lora, run.seed)
    return client


def _options(model: ModelSpec) -> dict[str, Any]:
    return {"dtype": getattr(torch, model.dtype), "attn_implementation": model.attention}
