"""The files of a part, which transformers refuses to load as a model.

From a part's tensors transformers would build a whole model, and give the other part's blocks
random weights.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from fedsplit import atomic
from fedsplit.errors import CheckpointError, ConfigError

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
    part.config.save_pretrained(directory)
    config = directory / CONFIG_NAME
    marked = json.loads(config.read_text(encoding="utf-8")) | {_MARK: REFUSAL}
    atomic.write_text(config, json.dumps(marked, indent=2))
    kept = _untied(part, tensors)
    save_file(kept, directory / WEIGHTS, metadata={"format": "pt"})
    # The Trainer resumes from the files of this index. transformers also needs its "metadata", so
    # that it does not load the part under another config either.
    index = {"weight_map": dict.fromkeys(kept, WEIGHTS)}
    atomic.write_text(directory / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2))
    return [CONFIG_NAME, WEIGHTS, SAFE_WEIGHTS_INDEX_NAME]


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


def unmarked(config: PretrainedConfig) -> PretrainedConfig:
    """The config of a part's directory, changed in place to that of the unsplit model."""
    vars(config).pop(_MARK, None)
    return config


def require_whole(config: PretrainedConfig, source: str) -> None:
    """Refuse the config of a part's directory.

    Raises:
        CheckpointError: The config is one.
    """
    if getattr(config, _MARK, None) == REFUSAL:
        raise CheckpointError(f"{source}: {REFUSAL}")
