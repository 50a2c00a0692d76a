"""The source of an unsplit model: a local directory or a hub id, with safetensors weights.

A part reads only its own tensors. From a sharded checkpoint on the hub, it downloads only the
shards that hold them.
"""

import functools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils.hub import cached_file

from fedsplit.data.hub import offline_reason, reporting_a_full_disk
from fedsplit.errors import CheckpointError, UnsupportedModel
from fedsplit.model.checkpoint_names import compared_parameters, names_in_memory
from fedsplit.model.config_sizes import building, require_small, too_small
from fedsplit.model.identity import (
    COMMIT,
    FLOATS,
    FULL,
    SAMPLE,
    VALUES,
    Values,
    files_digest,
    opened,
    values_digest,
    values_in_file,
)
from fedsplit.model.json_files import read_json
from fedsplit.model.part_files import require_whole
from fedsplit.model.quantization import quantization_of, require_readable, weight_of
from fedsplit.model.tensor_files import LazyTensor, read_tensors, require_floats, tensor_names
from fedsplit.randomness import process_state

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
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


# Endings of files with weights.
_OTHER_WEIGHTS = (".bin", ".gguf", ".h5", ".msgpack", ".pt", ".pth", ".safetensors")
# What transformers raises for files whose fields have other types than it expects.
_UNREADABLE = (OSError, ValueError, TypeError, AttributeError, LookupError)


# An index names each tensor; those of the largest models have a million.
_MAX_INDEX_BYTES = 100 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A local directory or a hub id with its revision."""

    name: str
    revision: str = "main"

    def config(self) -> PretrainedConfig:
        """The unsplit model's config.

        Raises:
            CheckpointError: transformers cannot read a model's config there.
            ConnectionLost: The hub does not answer.
            StorageError: The disk of the hub's cache is full.
        """
        offline = bool(offline_reason(self.name, self.revision))
        sizes = ""
        if (path := self._file("config.json")) is not None:
            content = read_json(path)
            require_small(path, content)
            sizes = too_small(content)
        try:
            with reporting_a_full_disk(self.name):
                config: PretrainedConfig = AutoConfig.from_pretrained(
                    self.name,
                    revision=self.revision,
                    trust_remote_code=False,
                    local_files_only=offline,
                )
        except (*_UNREADABLE, ArithmeticError, StrictDataclassError) as exc:
            hint = f"; it has {sizes}" if sizes else ""
            raise CheckpointError(
                f"{self.name}: not a model that transformers {transformers.__version__} can read "
                f"({_first_line(exc)}{hint}); give a directory with config.json or a hub id"
            ) from exc
        return config

    def generation_config(self) -> GenerationConfig | None:
        """The generation config of the model's author; None if there is none.

        Raises:
            CheckpointError: The file cannot be read.
        """
        # transformers raises OSError for a missing file and for an unreadable one.
        path = self._file(GENERATION)
        if path is None:
            return None
        read_json(path)
        try:
            config: GenerationConfig = GenerationConfig.from_pretrained(path.parent)
        except _UNREADABLE as exc:
            raise CheckpointError(f"{self.name}: {GENERATION}: {_first_line(exc)}") from exc
        return config

    def tensors_of(
        self, part: PreTrainedModel, *, lazily: bool = False, mapped: bool = False
    ) -> dict[str, Tensor | LazyTensor]:
        """The tensors of `part`, by their names in the files.

        Args:
            part: A model on the meta device.
            lazily: Whether a tensor, or a piece of it, is read when its values are asked for.
            mapped: Whether such values stay in the mapped file; see `LazyTensor`.

        Raises:
            CheckpointError: There are no safetensors weights, or a file is damaged.
            UnsupportedModel: The weights are quantized by a method that parts do not have, or an
                adapter is beside them.
        """
        self._require_plain(part.config)
        require_whole(part.config, self.name)
        files = self._files_by_tensor(part.config)
        names = _names_needed(part, list(files))
        by_file = {
            self._shard(file): [name for name in names if files[name] == file]
            for file in sorted({files[name] for name in names})
        }
        for path, in_file in by_file.items():
            if not quantization_of(part.config):
                require_floats(path, in_file)
        tensors: dict[str, Tensor | LazyTensor] = {}
        for path, in_file in by_file.items():
            if lazily:
                tensors.update({name: LazyTensor(path, name, mapped=mapped) for name in in_file})
            else:
                tensors.update(read_tensors(path, in_file))
        return tensors

    def dtype(self, config: PretrainedConfig) -> torch.dtype:
        """The dtype in which transformers loads the whole model.

        It is the config's, or else that of the first tensor of floats. The first one of a part may
        have another dtype.

        Raises:
            CheckpointError: There are no safetensors weights, or a file is damaged.
        """
        dtype: Any = config.dtype
        if dtype is None:
            first = self._shard(min(self._files_by_tensor(config).values()))
            with opened(first) as file:
                # Only the header is read: a shard may be larger than the memory of a client.
                kinds = [file.get_slice(name).get_dtype() for name in file.keys()]
            dtype = next((FLOATS[kind] for kind in kinds if kind in FLOATS), torch.float32)
        found: torch.dtype = dtype
        return found

    def identity(
        self,
        config: PretrainedConfig,
        whole: PreTrainedModel,
        head: Iterable[str] = (),
        *,
        full: bool = False,
    ) -> dict[str, str]:
        """The digests of the weights, by kind; see `fedsplit.model.identity`.

        Where a part has downloaded its own shards only, the commit is all that is known.

        Args:
            config: The source's config.
            whole: The unsplit model on the meta device.
            head: Its modules that the source need not have.
            full: Also hash all bytes; downloads all shards.

        Raises:
            CheckpointError: There are no safetensors weights, or a file is damaged.
        """
        files = sorted(set(self._files_by_tensor(config).values()))
        find = self._shard if full else functools.partial(self._file, here=True)
        paths = [path for file in files if (path := find(file)) is not None]
        commit = self.commit()
        found = {COMMIT: commit} if commit else {}
        if len(paths) == len(files):
            found[SAMPLE] = files_digest(paths)
            found[VALUES] = values_digest(_compared_in(paths, whole, head))
        if full:
            found[FULL] = files_digest(paths, full=True)
        return found

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

    def _require_plain(self, config: PretrainedConfig) -> None:
        """Refuse what transformers would apply to the weights beyond reading them."""
        require_readable(config, self.name)
        if self._file(ADAPTER) is not None:
            raise UnsupportedModel(
                f"{self.name}: there is an adapter beside the model ({ADAPTER}), which "
                "transformers would add to it; move the adapter's files to a directory of their "
                "own and give that to load_adapter or --adapter, or merge the adapter"
            )

    def _files_by_tensor(self, config: PretrainedConfig) -> dict[str, str]:
        """The name of each tensor's file, by the tensor's name.

        The order is that of transformers: an index beside a single file is left from an earlier
        checkpoint.
        """
        named = getattr(config, "transformers_weights", None)
        if named and not _is_plain_name(named):
            raise CheckpointError(
                f"{self.name}: transformers_weights={named!r} in config.json must be the name of a "
                "file beside it"
            )
        for file in (named,) if named else (SINGLE, INDEX):
            path = self._file(file)
            if path is not None and file.endswith(".index.json"):
                return self._in_shards(_listed(path))
            if path is not None:
                return dict.fromkeys(tensor_names(path), file)
        raise CheckpointError(
            f"{self.name}: no {named or SINGLE}{self._offline()}{self._instead()}; fedsplit reads "
            "safetensors only and never pickled weights; save the model again with save_pretrained"
        )

    def _in_shards(self, listed: dict[str, str]) -> dict[str, str]:
        """What an index lists, with the tensors that a directory's shards really hold."""
        folder = Path(self.name)
        shards = [file for file in sorted(set(listed.values())) if (folder / file).is_file()]
        held = {name: file for file in shards for name in tensor_names(folder / file)}
        return {**listed, **held}

    def _instead(self) -> str:
        """The names of other files with weights in a directory, for an error."""
        folder = Path(self.name)
        found = sorted(p.name for p in folder.glob("*") if p.suffix in _OTHER_WEIGHTS)
        return f", but {', '.join(found)}" if found else ""

    def _offline(self) -> str:
        """Why a file is missing that the hub may have, for an error."""
        reason = offline_reason(self.name, self.revision)
        return f" in the hub's cache ({reason})" if reason else ""

    def _shard(self, file: str) -> Path:
        path = self._file(file)
        if path is None:
            raise CheckpointError(
                f"{self.name}: {file} is missing{self._offline()}, but {INDEX} lists it"
            )
        return path

    def _file(self, file: str, *, here: bool = False) -> Path | None:
        """The local path of a file; `here` downloads nothing."""
        here = here or bool(offline_reason(self.name, self.revision))
        try:
            with reporting_a_full_disk(self.name):
                path = cached_file(
                    self.name,
                    file,
                    revision=self.revision,
                    local_files_only=here,
                    _raise_exceptions_for_missing_entries=False,
                )
        except OSError as exc:
            raise CheckpointError(f"{self.name}: {_first_line(exc)}") from exc
        return None if path is None else Path(path)


def _listed(index: Path) -> dict[str, str]:
    """The name of each tensor's file, by the tensor's name, as an index lists them."""
    files = read_json(index, max_bytes=_MAX_INDEX_BYTES).get("weight_map")
    # A checkpoint may come from elsewhere; it must not name files outside its directory.
    if not isinstance(files, dict) or not all(map(_is_plain_name, files.values())):
        raise CheckpointError(
            f"{index}: not an index of tensors (weight_map must map each one to the plain name of "
            "its file)"
        )
    return files


def _is_plain_name(file: object) -> bool:
    return isinstance(file, str) and Path(file).name == file


def on_meta(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """The model on the meta device, where its tensors have no memory.

    Raises:
        ConfigError: A size in the config is too small.
        UnsupportedModel: The family refuses the config.
    """
    # `no_init_weights` and the device replace functions of the process, so this takes the lock.
    with process_state(), torch.device("meta"), no_init_weights(), building(config):
        model: PreTrainedModel = model_class(config)
    return model


def _names_needed(part: PreTrainedModel, names: list[str]) -> list[str]:
    """The names of tensors in the files that become tensors of the part."""
    held = part.state_dict()
    return [f for f, name in names_in_memory(part, names).items() if weight_of(name) in held]


def _compared_in(
    paths: Iterable[Path], whole: PreTrainedModel, head: Iterable[str]
) -> Iterator[tuple[str, Sequence[int], Values]]:
    """The compared parameters in safetensors files."""
    compared, ties = compared_parameters(whole, head), whole.all_tied_weights_keys
    for path in paths:
        names = names_in_memory(whole, tensor_names(path))
        for in_file, shape, values in values_in_file(path):
            # A file may have a tied tensor under either name.
            name = ties.get(names[in_file], names[in_file])
            if name in compared:
                yield name, shape, values


def _first_line(exc: Exception) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0]
