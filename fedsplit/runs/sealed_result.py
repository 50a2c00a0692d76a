"""The result of a run with sealed client weights: the trunk, and weights that only clients open.

`model/` has the trunk's tensors, the sum of the sealed weights, the config and the tokenizer. A
client that has the key joins them to the whole model.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from fedsplit.client.seal import Seal, SealedWeights
from fedsplit.errors import CheckpointError, ConfigError
from fedsplit.model import join_model
from fedsplit.model.describe import parts_of, shared
from fedsplit.model.source import Source
from fedsplit.model.stage import TrunkPart
from fedsplit.runs.folder import RunFolder

_TRUNK, _SEALED = "trunk.safetensors", "sealed.safetensors"


def write_sealed(folder: Path, trunk: TrunkPart, sealed: Mapping[str, Tensor]) -> None:
    """Write the trunk and the sealed weights of a run into a folder."""
    trunk.config.save_pretrained(folder)
    # Tied weights are written each, since another client may not tie them.
    state = {name: tensor.clone().contiguous() for name, tensor in trunk.state_dict().items()}
    save_file(state, folder / _TRUNK)
    save_file(dict(sealed), folder / _SEALED)


def joined(folder: RunFolder, seal: Seal) -> PreTrainedModel:
    """Return the whole model of a finished run with sealed client weights.

    Args:
        folder: The run's folder, or a copy of it.
        seal: The seal of the clients.

    Raises:
        ConfigError: The run is of another kind, or its weights were sealed with another key.
        CheckpointError: A file is missing or damaged.
    """
    if not folder.run.client_weights.sealed:
        raise ConfigError(
            f"{folder.path} is a run without client_weights.sealed; its model is in {folder.model}"
        )
    try:
        trunk, sealed = (load_file(folder.model / name) for name in (_TRUNK, _SEALED))
    except (OSError, SafetensorError) as exc:
        raise CheckpointError(f"{folder.model} has no sealed result: {exc}") from exc
    opened = seal.opened(SealedWeights.of_tensors(sealed))
    # The initial weights of clients are those of their key, also where none are trained.
    run = replace(folder.run, seed=seal.initial)
    parts = parts_of(run, Source(name=str(folder.model)).config())
    parts.trunk.load_state_dict(trunk)
    with torch.no_grad():
        weights = shared(parts.client, run)
        # None if no round had a client: then the weights are the initial ones.
        for name, tensor in opened.items():
            weights[name].copy_(tensor)
    return join_model(parts.client, parts.trunk)
