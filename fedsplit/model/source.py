"""The source of an unsplit model: a local directory or a hub id, with safetensors weights.

A part reads only its own tensors. From a sharded checkpoint on the hub, it downloads only the
shards that hold them.
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
        """The unsplit model's config.

        Raises:
            CheckpointError: transformers cannot read a model's config there.
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
        """The generation config of the model's author; None if there is none.

        Raises:
            CheckpointError: The file cannot be read.
        """
        # transformers raises OSError for a missing file and for an unreadable one.
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
        """The tensors of `part`, by their names in the files.

        Args:
            part: A model on the meta device.

        Raises:
            CheckpointError: There are no safetensors weights, or a file is damaged.
        """
        files = self._files_by_tensor()
        names = _names_needed(part, list(files))
        tensors: dict[str, Tensor] = {}
        for file in sorted({files[name] for name in names}):
            in_file = [name for name in names if files[name] == file]
            tensors.update(read_tensors(self._shard(file), in_file))
        return tensors

    def commit(self) -> str:
        """The commit of a hub id's files; empty for a directory."""
        # The hub's cache keeps a file as `snapshots/COMMIT/FILE`.
        path = self._file("config.json")
        is_cached = path is not None and path.parent.parent.name == "snapshots"
        return path.parent.name if path is not None and is_cached else ""

    def copy_texts(self, directory: Path) -> None:
        """Copy the files of the tokenizer and the generation config, if they exist."""
        for name in (GENERATION, *TOKENIZER_FILES):
            path = self._file(name)
            if path is not None:
                shutil.copyfile(path, directory / name)

    def file(self, name: str) -> Path:
        """The local path of a file, which is downloaded if necessary.

        Raises:
            CheckpointError: The source has no such file.
        """
        path = self._file(name)
        if path is None:
            raise CheckpointError(f"{self.name}: there is no {name}")
        return path

    def _files_by_tensor(self) -> dict[str, str]:
        """The name of each tensor's file, by the tensor's name."""
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
                "weights; save the model again with save_pretrained"
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
    """The names of the tensors in a safetensors file, from its header.

    Raises:
        CheckpointError: The file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"{path}: not a readable safetensors file ({exc})") from exc


def read_tensors(path: Path, names: list[str]) -> dict[str, Tensor]:
    """Copies of these tensors of a safetensors file; no other tensor is read.

    Raises:
        CheckpointError: The file is damaged or lacks a tensor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # Tensors of the mapped file may be unaligned, which changes the rounding of kernels.
            return {name: file.get_tensor(name).clone() for name in names}
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"{path}: cannot be read ({exc})") from exc


def on_meta(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """The model on the meta device, where its tensors have no memory."""
    # `no_init_weights` and the device replace functions of the process, so this takes the lock.
    with process_state(), torch.device("meta"), no_init_weights():
        model: PreTrainedModel = model_class(config)
    return model


def _names_needed(part: PreTrainedModel, names: list[str]) -> list[str]:
    """The names of tensors in the files that become tensors of the part.

    The function uses the renaming of transformers' loader, which also covers older names and fused
    experts.
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
