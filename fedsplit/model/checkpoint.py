"""Parts on disk: split a checkpoint into part directories, save a part, load it, join two parts."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from fedsplit import atomic
from fedsplit.errors import CheckpointError, ConfigError
from fedsplit.model.build import build_client, build_trunk
from fedsplit.model.identity import model_fingerprint
from fedsplit.model.join import join_model
from fedsplit.model.manifest import PARTS, Manifest, hashes_of
from fedsplit.model.part_files import (
    WEIGHTS,
    as_saved,
    manifest_of,
    require_no_adapter,
    write_files,
)
from fedsplit.model.plan import model_class_for, plan_for
from fedsplit.model.source import Source, on_meta
from fedsplit.model.stage import ClientPart, TrunkPart
from fedsplit.model.tensor_files import read_tensors, tensor_names
from fedsplit.spec import SplitSpec

_BUILD: dict[str, Callable[..., ClientPart | TrunkPart]] = dict(
    zip(PARTS, (build_client, build_trunk), strict=True)
)


def split_checkpoint(
    source: str,
    split: SplitSpec,
    out_dir: str | Path,
    *,
    revision: str = "main",
    model_class: type[PreTrainedModel] | None = None,
) -> dict[str, Path]:
    """Write the parts of a model to `out_dir/bottom-top` and `out_dir/trunk`.

    One part is in memory at a time. The client's directory also gets the tokenizer and the
    generation config.

    Args:
        source: Local directory or hub id of the unsplit model.
        split: The number of blocks in each part.
        out_dir: Created if it does not exist.
        revision: The branch, tag or commit of a hub id.
        model_class: The family's class; by default the causal language model of the config.

    Returns:
        The two directories by name of the part.

    Raises:
        UnsupportedModel: The model cannot be cut exactly.
        CheckpointError: The source is not a model, or a tensor is missing.
    """
    origin = Source(name=source, revision=revision)
    config = origin.config()
    directories = {}
    # A model that cannot be cut is refused before its files are read.
    model_class = model_class or model_class_for(config)
    # The parts read their own tensors only; the whole is hashed here, where all are needed.
    whole = on_meta(model_class, copy.deepcopy(config))
    head = plan_for(model_class, config).head
    identity = origin.identity(config, whole, head, full=True)
    for name, build in _BUILD.items():
        directory = Path(out_dir) / name
        atomic.make_folder(directory)
        # Before the manifest, which holds the hashes of all files.
        if name == "bottom-top":
            with atomic.writing(directory):
                origin.copy_texts(directory)
        part = build(config, split, source=source, revision=revision, model_class=model_class)
        part.identity.update(identity)
        _write_part(part, name, split, origin, directory)
        # Frees the memory before the next part is read.
        del part
        directories[name] = directory
    return directories


def _write_part(
    part: ClientPart | TrunkPart, name: str, split: SplitSpec, origin: Source, directory: Path
) -> None:
    write_files(part, part.state_dict(), directory)
    manifest_of(
        part,
        name,
        split,
        model=origin.name,
        revision=origin.commit(),
        files=hashes_of(directory),
    ).write(directory)


def load_part(directory: str | Path, **options: Any) -> ClientPart | TrunkPart:
    """The part in a directory that `split_checkpoint` wrote.

    Args:
        directory: `.../bottom-top` or `.../trunk`; no other file is read.
        options: For `from_pretrained`: dtype, attn_implementation, device_map.

    Raises:
        CheckpointError: The directory has no part, differs from its manifest, or lacks a tensor.
    """
    directory = Path(directory)
    manifest = Manifest.read(directory)
    manifest.verify(directory)
    config = as_saved(Source(name=str(directory)).config(), directory)
    split = _split_of(manifest, directory)
    # No hash covers the manifest itself, so its split is checked by the fingerprint.
    if model_fingerprint(config, split) != manifest.fingerprint:
        raise CheckpointError(
            f"{directory}: config.json and split {split} have fingerprint "
            f"{model_fingerprint(config, split)}, but the manifest says {manifest.fingerprint}"
        )
    weights = directory / WEIGHTS
    names = tensor_names(weights)
    require_no_adapter(names, weights)
    part = _BUILD[manifest.part](
        config,
        split,
        state_dict=read_tensors(weights, names),
        model_class=_class_named(manifest.model_class, directory),
        **options,
    )
    part.identity.update(manifest.identity)
    generation = Source(name=str(directory)).generation_config()
    if generation is not None:
        part.generation_config = generation
    return part


def join_checkpoint(
    client: ClientPart | str | Path, trunk: TrunkPart | str | Path, out_dir: str | Path
) -> None:
    """Write the unsplit model of two parts as a plain Hugging Face checkpoint.

    Args:
        client: The client's part, or its directory.
        trunk: The trunk, or its directory.
        out_dir: The directory of the checkpoint, for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        CheckpointError: A directory does not hold the expected part.
        ConfigError: The parts are not from the same model or the same cut.
    """
    client_part = load_part(client) if isinstance(client, (str, Path)) else client
    trunk_part = load_part(trunk) if isinstance(trunk, (str, Path)) else trunk
    if not isinstance(client_part, ClientPart) or not isinstance(trunk_part, TrunkPart):
        raise CheckpointError(
            f"join needs the {PARTS[0]} part first and the {PARTS[1]} second, "
            f"not {client} and {trunk}"
        )
    joined = join_model(client_part, trunk_part)
    with atomic.writing(Path(out_dir)):
        joined.save_pretrained(out_dir)


def _split_of(manifest: Manifest, directory: Path) -> SplitSpec:
    try:
        return SplitSpec.parse(manifest.split)
    except ConfigError as exc:
        raise CheckpointError(f"{directory}: {exc}") from exc


def _class_named(name: str, directory: Path) -> type[PreTrainedModel]:
    # The name comes from a file, so anything but a model class is refused.
    model_class = getattr(transformers, name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise CheckpointError(
            f"{directory}: transformers {transformers.__version__} has no model class {name!r}; "
            "install the version that split the model (manifest.json has it)"
        )
    return model_class
