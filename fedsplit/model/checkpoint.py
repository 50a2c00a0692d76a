"""Parts on disk: split a checkpoint into part directories, load one part, join them again.

A part's weights do not lie in `model.safetensors`, so that transformers, which would fill the
other part's blocks with random numbers, finds no model in the directory.
"""

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from fedsplit.errors import CheckpointError, ConfigError
from fedsplit.model.build import build_client, build_trunk, join_model
from fedsplit.model.manifest import FORMAT, PARTS, Manifest, hashes_of, versions
from fedsplit.model.source import Source, read_tensors, tensor_names
from fedsplit.model.stage import ClientPart, TrunkPart
from fedsplit.spec import SplitSpec

WEIGHTS = "part.safetensors"
_BUILD: dict[str, Callable[..., ClientPart | TrunkPart]] = dict(
    zip(PARTS, (build_client, build_trunk), strict=True)
)
# Fields that do not change what the model computes, or differ between its copies.
_VOLATILE = frozenset({"architectures", "transformers_version", "dtype", "torch_dtype"})


def model_fingerprint(config: PretrainedConfig, split: SplitSpec) -> str:
    """16 hex digits, equal at two sides iff they cut the same model in the same place."""
    num_blocks = config.get_text_config(decoder=True).num_hidden_layers
    told = {"config": _lasting(config.to_dict()), "cut": split.cut(num_blocks)}
    text = json.dumps(told, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            str(k): _lasting(v)
            for k, v in value.items()
            if k not in _VOLATILE and not str(k).startswith("_")
        }
    return [_lasting(v) for v in value] if isinstance(value, (list, tuple)) else value


def split_checkpoint(
    source: str,
    split: SplitSpec,
    out_dir: str | Path,
    *,
    revision: str = "main",
    model_class: type[PreTrainedModel] | None = None,
) -> dict[str, Path]:
    """Write the parts of a model to `out_dir/bottom-top` and `out_dir/trunk`.

    One part is in memory at a time. The client's directory gets the tokenizer and the
    generation config too.

    Args:
        source: Local directory or hub id of the whole model.
        split: How many blocks each part holds.
        out_dir: Made if it is not there.
        revision: Of a hub id.
        model_class: The family's class; the causal language model of the config by default.

    Returns:
        The two directories by name of the part.

    Raises:
        UnsupportedModel: The model cannot be cut exactly.
        CheckpointError: The source is no model, or not whole.
    """
    origin = Source(name=source, revision=revision)
    config = origin.config()
    directories = {}
    for name, build in _BUILD.items():
        directory = Path(out_dir) / name
        directory.mkdir(parents=True, exist_ok=True)
        if name == "bottom-top":
            origin.copy_texts(directory)
        part = build(config, split, source=source, revision=revision, model_class=model_class)
        _write_part(part, name, split, origin, directory)
        del part  # before the next one is read
        directories[name] = directory
    return directories


def _write_part(
    part: ClientPart | TrunkPart, name: str, split: SplitSpec, origin: Source, directory: Path
) -> None:
    part.config.save_pretrained(directory)
    save_file(_untied_state(part), directory / WEIGHTS, metadata={"format": "pt"})
    Manifest(
        format=FORMAT,
        part=name,
        model=origin.name,
        revision=origin.commit(),
        model_class=part.family.__name__,
        split=str(split),
        trunk_blocks=[part.trunk_blocks.start, part.trunk_blocks.stop],
        fingerprint=model_fingerprint(part.config, split),
        versions=versions(_own_version()),
        files=hashes_of(directory),
    ).write(directory)


def _untied_state(part: PreTrainedModel) -> dict[str, Tensor]:
    """The part's tensors, each once: a tied one under the name it is tied to."""
    tied = part.all_tied_weights_keys
    return {k: t.detach().contiguous() for k, t in part.state_dict().items() if k not in tied}


def load_part(directory: str | Path, **options: Any) -> ClientPart | TrunkPart:
    """The part in a directory that `split_checkpoint` wrote; reads nothing else.

    Args:
        directory: `.../bottom-top` or `.../trunk`.
        options: For `from_pretrained`: dtype, attn_implementation, device_map.

    Raises:
        CheckpointError: The directory is no part's, is not what its manifest says, or lacks a
            tensor.
    """
    directory = Path(directory)
    manifest = Manifest.read(directory)
    manifest.verify(directory)
    config, split = Source(name=str(directory)).config(), _split_of(manifest, directory)
    if model_fingerprint(config, split) != manifest.fingerprint:
        raise CheckpointError(
            f"{directory}: config.json and split {split} have fingerprint "
            f"{model_fingerprint(config, split)}, but the manifest says {manifest.fingerprint}"
        )
    weights = directory / WEIGHTS
    part = _BUILD[manifest.part](
        config,
        split,
        state_dict=read_tensors(weights, tensor_names(weights)),
        model_class=_class_named(manifest.model_class, directory),
        **options,
    )
    generation = Source(name=str(directory)).generation_config()
    if generation is not None:
        part.generation_config = generation
    return part


def join_checkpoint(
    client: ClientPart | str | Path, trunk: TrunkPart | str | Path, out_dir: str | Path
) -> None:
    """Write the unsplit model of two parts as a plain Hugging Face checkpoint.

    Args:
        client: In memory, or its directory.
        trunk: In memory, or its directory.
        out_dir: What `AutoModelForCausalLM.from_pretrained` will load.

    Raises:
        CheckpointError: A directory is not the part it should be.
        ConfigError: The parts are not cut from one model in one place.
    """
    ends = load_part(client) if isinstance(client, (str, Path)) else client
    middle = load_part(trunk) if isinstance(trunk, (str, Path)) else trunk
    if not isinstance(ends, ClientPart) or not isinstance(middle, TrunkPart):
        raise CheckpointError(
            f"join needs the {PARTS[0]} part first and the {PARTS[1]} second, "
            f"not {client} and {trunk}"
        )
    join_model(ends, middle).save_pretrained(out_dir)


def _split_of(manifest: Manifest, directory: Path) -> SplitSpec:
    try:
        return SplitSpec.parse(manifest.split)
    except ConfigError as exc:
        raise CheckpointError(f"{directory}: {exc}") from exc


def _class_named(name: str, directory: Path) -> type[PreTrainedModel]:
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise CheckpointError(
            f"{directory}: transformers {transformers.__version__} has no model class {name!r}"
        )
    return found


def _own_version() -> str:
    try:
        return version("fedsplit")
    except PackageNotFoundError:
        return "unknown"
