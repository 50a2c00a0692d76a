"""Where a whole model comes from: a local directory or a hub id, with safetensors weights.

A part reads only its own tensors, and of a sharded checkpoint on the hub only the shards that
hold them are fetched.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights
from transformers.utils.hub import cached_file

from fedsplit.errors import CheckpointError
from fedsplit.randomness import process_state

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A local directory or a hub id with its revision."""

    name: str
    revision: str = "main"

    def config(self) -> PretrainedConfig:
        """The whole model's config.

        Raises:
            CheckpointError: Nothing is there that transformers can read as a model.
        """
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(
                self.name, revision=self.revision, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, StrictDataclassError) as exc:
            raise CheckpointError(
                f"{self.name}: not a model that transformers {transformers.__version__} can read "
                f"({_first_line(exc)}); give a directory with config.json or a hub id"
            ) from exc
        return config

    def generation_config(self) -> GenerationConfig | None:
        """How the model's author wants it to generate, if that was said.

        Raises:
            CheckpointError: It was said in a file that cannot be read.
        """
        if self._file(GENERATION) is None:
            return None
        try:
            config: GenerationConfig = GenerationConfig.from_pretrained(
                self.name, revision=self.revision
            )
        except (OSError, ValueError, TypeError) as exc:
            raise CheckpointError(f"{self.name}: {GENERATION}: {_first_line(exc)}") from exc
        return config

    def tensors_of(self, part: PreTrainedModel) -> dict[str, Tensor]:
        """The tensors that `part`, a model on the meta device, holds, as named in the files.

        Raises:
            CheckpointError: There are no safetensors weights, or a file is damaged.
        """
        files = self._files_by_tensor()
        wanted = _names_needed(part, list(files))
        found: dict[str, Tensor] = {}
        for file in sorted({files[name] for name in wanted}):
            here = [name for name in wanted if files[name] == file]
            found.update(read_tensors(self._shard(file), here))
        return found

    def commit(self) -> str:
        """The commit that a hub id's files are of; empty for a directory."""
        path = self._file("config.json")
        is_cached = path is not None and path.parent.parent.name == "snapshots"
        return path.parent.name if path is not None and is_cached else ""

    def copy_texts(self, directory: Path) -> None:
        """Copy what there is of the model's tokenizer and generation config."""
        for name in (GENERATION, *TOKENIZER_FILES):
            path = self._file(name)
            if path is not None:
                shutil.copyfile(path, directory / name)

    def file(self, name: str) -> Path:
        """Where one of its files is.

        Raises:
            CheckpointError: It has no such file.
        """
        path = self._file(name)
        if path is None:
            raise CheckpointError(f"{self.name}: there is no {name}")
        return path

    def _files_by_tensor(self) -> dict[str, str]:
        index = self._file(INDEX)
        if index is not None:
            try:
                files: dict[str, str] = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as exc:
                raise CheckpointError(f"{index}: not an index of tensors ({exc!r})") from exc
            return files
        single = self._file(SINGLE)
        if single is None:
            raise CheckpointError(
                f"{self.name}: no {SINGLE}; fedsplit reads safetensors only and never pickled "
                "weights: save the model again with save_pretrained"
            )
        return dict.fromkeys(tensor_names(single), SINGLE)

    def _shard(self, file: str) -> Path:
        path = self._file(file)
        if path is None:
            raise CheckpointError(f"{self.name}: {file} is missing, but {INDEX} lists it")
        return path

    def _file(self, file: str) -> Path | None:
        try:
            path = cached_file(
                self.name,
                file,
                revision=self.revision,
                _raise_exceptions_for_missing_entries=False,
            )
        except OSError as exc:
            raise CheckpointError(f"{self.name}: {_first_line(exc)}") from exc
        return None if path is None else Path(path)


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file; reads its header only."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"{path}: not a readable safetensors file ({exc})") from exc


def read_tensors(path: Path, names: list[str]) -> dict[str, Tensor]:
    """These tensors of a safetensors file, in memory of their own; reads nothing else.

    Raises:
        CheckpointError: The file is damaged or lacks one of them.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # The clone leaves the mapped file, whose tensors may lie at odd addresses.
            return {name: file.get_tensor(name).clone() for name in names}
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"{path}: cannot be read ({exc})") from exc


def on_meta(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """The model without memory for its tensors."""
    with process_state(), torch.device("meta"), no_init_weights():
        model: PreTrainedModel = model_class(config)
    return model


def _names_needed(part: PreTrainedModel, names: list[str]) -> list[str]:
    """Those of `names`, as written in the files, that end up in the part.

    Asks the loader's own renaming, so older names and fused experts are found too.
    """
    changes = get_model_conversion_mapping(part)
    renamings = [c for c in changes if isinstance(c, WeightRenaming)]
    converters = [c for c in changes if isinstance(c, WeightConverter)]
    held, prefix = part.state_dict(), part.base_model_prefix
    return [
        name
        for name in names
        if rename_source_key(name, renamings, converters, prefix, held)[0] in held
    ]


def _first_line(exc: Exception) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0]
