"""The identity of a model: by it, client and trunk find out whether they hold parts of one model.

It consists of the settings that change the trunk's computation, and of digests of the weights that
the parts came from. The parts hold different tensors, so the digests are of the whole model.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from fedsplit.errors import CheckpointError
from fedsplit.spec import SplitSpec

# --- the settings -----------------------------------------------------------------------------

# Every config has these: names, dtypes, labels, and what a call returns. Other code sets them in
# passing, such as the Trainer, `generate` and pipelines.
_OF_ALL = frozenset(PretrainedConfig().to_dict()) - {
    "model_type",
    "is_encoder_decoder",
    "chunk_size_feed_forward",
}
# Checkpoints of older versions have the settings of generation in their config.
_OF_GENERATION = frozenset(GenerationConfig().to_dict())
_OF_OTHERS = frozenset(
    (
        "attn_implementation",
        "auto_map",
        "classifier_dropout",
        "experts_implementation",
        "gradient_checkpointing",
        "name_or_path",
        "num_labels",
        "output_router_logits",
        # Each side may have its own blocks in fewer bits.
        "quantization_config",
        "router_aux_loss_coef",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers_weights",
        "use_return_dict",
        # The client holds the embeddings and the head, which may grow by new tokens.
        "vocab_size",
    )
)
_LEFT_OUT = _OF_ALL | _OF_GENERATION | _OF_OTHERS
_TOKENS = ("_token_id", "_token_ids", "_token_index")


def model_settings(config: PretrainedConfig, split: SplitSpec) -> dict[str, str]:
    """The settings of config and cut that change the trunk's computation, as JSON by dotted name.

    Dropout is among them, but nothing that concerns tokens, outputs, labels, names or precision.
    """
    num_blocks = config.get_text_config(decoder=True).num_hidden_layers
    # The cut in numbers, since "1/2/1" and "1/*/1" may be the same.
    values = {"blocks of the trunk": split.cut(num_blocks), **dict(_flat(config.to_dict(), ""))}
    return {name: json.dumps(_plain(value), default=str) for name, value in values.items()}


def model_fingerprint(config: PretrainedConfig, split: SplitSpec) -> str:
    """16 hex digits, equal for two parts if and only if their `model_settings` are."""
    text = json.dumps(model_settings(config, split), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _flat(node: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        name = str(key)
        if name in _LEFT_OUT or name.startswith("_") or name.endswith(_TOKENS):
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _plain(value: Any) -> Any:
    """The value as JSON writes it; a file may have 10000 where another has 10000.0."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def difference(client: Mapping[str, str], trunk: Mapping[str, str], most: int = 3) -> str:
    """The first settings that differ, with both values; empty if none do."""
    names = sorted(n for n in {*client, *trunk} if client.get(n) != trunk.get(n))
    told = [
        f"{name} is {_short(client.get(name))} at the client and {_short(trunk.get(name))} at the "
        "trunk"
        for name in names[:most]
    ]
    rest = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join(told + rest)


def _short(value: str | None) -> str:
    if value is None:
        return "absent"
    return value if len(value) <= 60 else f"{value[:57]}..."


# --- the weights ------------------------------------------------------------------------------

FULL, SAMPLE, MEMORY, VALUES, COMMIT = "full", "sample", "memory", "values", "commit"
ADAPTER = "adapter"
# The kinds of a weights' digest; two sides compare the first one that both have.
_OF_WEIGHTS = {
    FULL: "the digest of all their bytes",
    SAMPLE: "the digest of a sample of each tensor",
    MEMORY: "the digest of the model in memory that was split",
    VALUES: "the digest of a sample of each parameter, rounded to bfloat16,",
    COMMIT: "the commit of the checkpoint on the hub",
}
_WHOLE_BYTES, _PIECES, _PIECE_BYTES = 64 << 10, 16, 64
_CHUNK_BYTES = 1 << 20
_PIECE_VALUES = 16
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The dtypes of floats by their names in safetensors files."""

Values = Callable[[int, int], Tensor]
"""`values(begin, size)` returns a part of a tensor's values as one vector."""


def files_digest(paths: Iterable[Path], *, full: bool = False) -> str:
    """16 hex digits of the tensors in safetensors files: their names, shapes, dtypes and values.

    The division into files does not matter. Of a tensor of more than 64 KiB, 16 pieces of 64 bytes
    count, or all bytes if `full` is set.
    """
    return _combined(entry for path in paths for entry in _entries(path, full))


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits of these tensors, from a sample as in `files_digest`; empty on "meta"."""
    if any(tensor.is_meta for tensor in tensors.values()):
        return ""

    def reader(tensor: Tensor) -> Callable[[int, int], bytes]:
        raw = tensor.detach().reshape(-1).view(torch.uint8)
        return lambda begin, size: raw[begin : begin + size].cpu().numpy().tobytes()

    return _combined(
        f"{name} {t.dtype} {list(t.shape)} {_sampled(reader(t), t.nbytes, full=False)}"
        for name, t in tensors.items()
    )


def values_digest(parameters: Iterable[tuple[str, Sequence[int], Values]]) -> str:
    """16 hex digits of the names, shapes and values of parameters, in files or in memory.

    Of each parameter, 16 pieces of 16 values count. They are rounded, so that the digest is the
    same for a model in memory that was loaded in bfloat16.
    """
    entries = set()
    for name, shape, values in parameters:
        size = math.prod(shape)
        last = max(size - _PIECE_VALUES, 0)
        starts = sorted({last * i // (_PIECES - 1) for i in range(_PIECES)})
        sample = torch.cat([values(at, min(_PIECE_VALUES, size)) for at in starts])
        rounded = sample.to(torch.bfloat16).view(torch.int16)
        entries.add(f"{name} {list(shape)} {hashlib.sha256(rounded.numpy().tobytes()).hexdigest()}")
    return _combined(entries)


def values_in_memory(tensor: Tensor) -> Values:
    """The values of a tensor, for `values_digest`."""
    flat = tensor.detach().reshape(-1)
    return lambda begin, size: flat[begin : begin + size].cpu()


def values_in_file(path: Path) -> Iterator[tuple[str, Sequence[int], Values]]:
    """Name, shape and values of each tensor of floats in a safetensors file."""
    for stored in _stored(path):
        dtype = FLOATS.get(stored.dtype)
        if dtype is None:
            continue

        def values(
            begin: int, size: int, stored: _Stored = stored, dtype: torch.dtype = dtype
        ) -> Tensor:
            read = stored.read(begin * dtype.itemsize, size * dtype.itemsize)
            return torch.frombuffer(bytearray(read), dtype=dtype)

        yield stored.name, stored.shape, values


def adapter_digest(path: Path, settings: Mapping[str, Any]) -> str:
    """16 hex digits of a saved adapter: its tensors, and settings such as rank and alpha."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return _combined([*_entries(path, full=False), text])


def misfit(client: Mapping[str, str], trunk: Mapping[str, str]) -> str:
    """Why parts of these identities do not fit, by their weights or adapters; empty if they do."""
    kind = next((kind for kind in _OF_WEIGHTS if kind in client and kind in trunk), "")
    if kind and client[kind] != trunk[kind]:
        return (
            f"the weights differ: {_OF_WEIGHTS[kind]} is {client[kind]} at the client and "
            f"{trunk[kind]} at the trunk; build both parts from the same checkpoint"
        )
    theirs, ours = client.get(ADAPTER), trunk.get(ADAPTER)
    if theirs == ours:
        return ""
    if theirs and ours:
        return (
            f"the adapters differ: the digest is {theirs} at the client and {ours} at the trunk; "
            "load the same adapter at both sides"
        )
    side, other = ("client", "trunk") if theirs else ("trunk", "client")
    return (
        f"the {side} has an adapter ({theirs or ours}) and the {other} has none; load it at the "
        f"{other} too, with --adapter or load_adapter"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """A tensor in an open safetensors file; `read(offset, size)` returns some of its bytes."""

    name: str
    dtype: str
    shape: list[int]
    nbytes: int
    read: Callable[[int, int], bytes]


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An open safetensors file, whose header has been checked.

    Raises:
        CheckpointError: The file cannot be read, its header is longer than safetensors allows, or
            it does not have the tensors that the header names.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({exc})") from exc


def _stored(path: Path) -> Iterator[_Stored]:
    # Views of safetensors would take the file's size in memory, so only its check is used.
    with opened(path), path.open("rb") as file:
        start = 8 + (length := int.from_bytes(file.read(8), "little"))
        header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]

            def read(offset: int, size: int, begin: int = begin) -> bytes:
                file.seek(start + begin + offset)
                return file.read(size)

            yield _Stored(
                name=name,
                dtype=tensor["dtype"],
                shape=tensor["shape"],
                nbytes=end - begin,
                read=read,
            )


def _entries(path: Path, full: bool) -> Iterator[str]:
    for stored in _stored(path):
        digest = _sampled(stored.read, stored.nbytes, full)
        yield f"{stored.name} {stored.dtype} {stored.shape} {digest}"


def _sampled(read: Callable[[int, int], bytes], size: int, full: bool) -> str:
    """The digest of a tensor's bytes, of which `read(offset, size)` returns some."""
    if full or size <= _WHOLE_BYTES:
        pieces = [(at, min(_CHUNK_BYTES, size - at)) for at in range(0, size, _CHUNK_BYTES)]
    else:
        last = size - _PIECE_BYTES
        pieces = [(last * i // (_PIECES - 1), _PIECE_BYTES) for i in range(_PIECES)]
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(read(*piece))
    return digest.hexdigest()


def _combined(entries: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(entries)).encode()).hexdigest()[:16]
