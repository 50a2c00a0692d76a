"""The files of a part, which transformers refuses to load as a model.

From a part's tensors transformers would build a whole model, and give the other part's blocks
random weights.
"""

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_NAME,
)

from fedsplit import atomic
from fedsplit.errors import CheckpointError, ConfigError
from fedsplit.model.identity import model_fingerprint
from fedsplit.model.json_files import read_json
from fedsplit.model.manifest import CLIENT, FORMAT, Manifest, sha256_of, versions
from fedsplit.spec import SplitSpec

WEIGHTS = "part.safetensors"
REFUSAL = (
    "this is one part of a split model and not a model; load it with "
    "fedsplit.model.checkpoint.load_part, or join both parts with `fedsplit join`"
)
TRUNK_VERSION = "trunk_version"
"""The tensor with the trunk's version, in the state dict of a client whose trunk follows."""

# transformers takes the name of the weights from this field of config.json, and raises an error
# with its value if it is not the name of a safetensors file.
_MARK = "transformers_weights"
# The default of `push_to_hub` in transformers.
_ONE_FILE = "50GB"
_OF_A_MODEL = (SAFE_WEIGHTS_NAME, WEIGHTS_NAME)


def write_files(part: PreTrainedModel, tensors: Mapping[str, Tensor], directory: Path) -> list[str]:
    """Write the config, the tensors and their index; return the names of the files.

    Raises:
        ConfigError: The directory holds a whole model.
    """
    for name in _OF_A_MODEL:
        # The Trainer would resume from it instead of from the part.
        if (directory / name).exists():
            raise ConfigError(
                f"{directory} holds a whole model ({name}); save the part to another directory"
            )
    kept = _untied(part, tensors)
    # First, since it is the largest: on a full disk, nothing of the directory changes.
    with atomic.new_file(directory / WEIGHTS) as unfinished:
        save_file(kept, unfinished, metadata={"format": "pt"})
    config = directory / CONFIG_NAME
    with atomic.writing(config):
        part.config.save_pretrained(directory)
    marked = json.loads(config.read_text(encoding="utf-8")) | {_MARK: REFUSAL}
    atomic.write_text(config, json.dumps(marked, indent=2))
    # The Trainer resumes from the files of this index. transformers also needs its "metadata", so
    # that it does not load the part under another config either.
    index = {"weight_map": dict.fromkeys(kept, WEIGHTS)}
    atomic.write_text(directory / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2))
    return [CONFIG_NAME, WEIGHTS, SAFE_WEIGHTS_INDEX_NAME]


def manifest_of(
    part: Any,
    name: str,
    split: SplitSpec,
    *,
    model: str,
    revision: str,
    files: dict[str, str],
) -> Manifest:
    """The manifest of a part, which is a `fedsplit.model.stage.Part`."""
    return Manifest(
        format=FORMAT,
        part=name,
        model=model,
        revision=revision,
        model_class=part.family.__name__,
        split=str(split),
        trunk_blocks=[part.trunk_blocks.start, part.trunk_blocks.stop],
        fingerprint=model_fingerprint(part.config, split),
        identity=part.identity,
        versions=versions(_own_version()),
        files=files,
    )


def save_part(
    part: Any,
    name: str,
    directory: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    is_main_process: bool = True,
    max_shard_size: int | str = _ONE_FILE,
    safe_serialization: bool = True,
    **options: Any,
) -> None:
    """Write a part in memory as `split_checkpoint` does; it is `save_pretrained` of a part.

    A directory that is saved to again keeps its other files, such as those of the Trainer.

    Args:
        part: A `fedsplit.model.stage.Part`.
        name: Its name, one of `PARTS`.
        directory: Created if it does not exist.
        state_dict: The tensors; by default the part's.
        is_main_process: Whether this process writes.
        max_shard_size: As `push_to_hub` of transformers passes it; a part is one file.
        safe_serialization: True; weights are never pickled.
        options: None of the other options of `save_pretrained` are supported.

    Raises:
        ConfigError: An option is not supported, or the directory holds a whole model.
    """
    unsupported = [f"{name}={value}" for name, value in options.items() if value]
    if max_shard_size != _ONE_FILE:
        unsupported.append(f"max_shard_size={max_shard_size}")
    if not safe_serialization:
        unsupported.append("safe_serialization=False")
    if unsupported:
        raise ConfigError(
            f"save_pretrained({', '.join(unsupported)}): a part is saved as one safetensors file; "
            "leave it out, and upload a part with its method push_to_hub"
        )
    if not is_main_process:
        return
    directory = Path(directory)
    atomic.make_folder(directory)
    names = write_files(part, part.state_dict() if state_dict is None else state_dict, directory)
    if name == CLIENT and part.can_generate():
        with atomic.writing(directory / GENERATION_CONFIG_NAME):
            part.generation_config.save_pretrained(directory)
        names.append(GENERATION_CONFIG_NAME)
    bounds = (part.trunk_blocks.start, part.trunk_blocks.stop, part.plan.num_blocks)
    split = SplitSpec(bottom=bounds[0], trunk=bounds[1] - bounds[0], top=bounds[2] - bounds[1])
    manifest_of(
        part,
        name,
        split,
        model=part.config.name_or_path or "",
        revision="",
        files={file: sha256_of(directory / file) for file in names},
    ).write(directory)


def _untied(part: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each once; a tied tensor has the name of its source."""
    # safetensors refuses tensors that share memory.
    tied = part.all_tied_weights_keys
    return {k: t.detach().contiguous() for k, t in tensors.items() if k not in tied}


def require_no_adapter(names: Iterable[str], source: Path) -> None:
    """Refuse the tensors of a part with adapters, whose config the files do not have.

    Raises:
        CheckpointError: There are adapters.
    """
    if wrapped := next((name for name in names if ".base_layer." in name), ""):
        raise CheckpointError(
            f"{source}: the part was saved with its adapters ('{wrapped}'); build it from its "
            "source, add the same adapters, and load this file with load_state_dict"
        )


def as_saved(config: PretrainedConfig, directory: Path) -> PretrainedConfig:
    """The config of a part's directory, changed in place to that of the part that was saved.

    A class of configs may change what it reads. Qwen2's drops a window that was set although
    `use_sliding_window` is false, and the part would have another fingerprint than its trunk.
    """
    vars(config).pop(_MARK, None)
    saved = read_json(directory / CONFIG_NAME)
    read = json.loads(config.to_json_string(use_diff=False))
    for name in saved.keys() & read.keys():
        if saved[name] != read[name] and not isinstance(getattr(config, name), PretrainedConfig):
            setattr(config, name, saved[name])
    return config


def require_whole(config: PretrainedConfig, source: str) -> None:
    """Refuse the config of a part's directory.

    Raises:
        CheckpointError: The config is one.
    """
    if getattr(config, _MARK, None) == REFUSAL:
        raise CheckpointError(f"{source}: {REFUSAL}")


def _own_version() -> str:
    try:
        return version("fedsplit")
    except PackageNotFoundError:
        # A checkout on the path, without an installed distribution.
        return "unknown"
