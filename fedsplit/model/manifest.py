"""The manifest of a part's directory: the model, the cut, and the hash of every file.

It also has a digest of itself, since no other file has one of the manifest.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import torch
import transformers

from fedsplit import atomic
from fedsplit.errors import CheckpointError

NAME = "manifest.json"
_DIGEST = "digest"
FORMAT = 3
PARTS = CLIENT, TRUNK = "bottom-top", "trunk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The fields of `manifest.json`.

    Attributes:
        format: Version of this layout.
        part: "bottom-top" (the client's) or "trunk".
        model: The local directory or hub id of the unsplit model.
        revision: The commit of a hub id; empty for a directory.
        model_class: Name of the family's class in transformers.
        split: Blocks of bottom, trunk and top.
        trunk_blocks: First block of the trunk, and first block after it.
        fingerprint: Equal for both parts of one cut of one model.
        identity: Digests of the weights of the whole model, by kind (`fedsplit.model.identity`).
        versions: Versions of fedsplit, transformers and torch, for information only.
        files: sha256 in hex of every other file in the directory, by name.
    """

    format: int
    part: str
    model: str
    revision: str
    model_class: str
    split: str
    trunk_blocks: list[int]
    fingerprint: str
    identity: dict[str, str]
    versions: dict[str, str]
    files: dict[str, str]

    def write(self, directory: Path) -> None:
        """Write the manifest atomically: a reader sees all of it or none."""
        atomic.write_text(directory / NAME, json.dumps(with_digest(asdict(self)), indent=2))

    @staticmethod
    def read(directory: Path) -> "Manifest":
        """The manifest of a part's directory.

        Raises:
            CheckpointError: The manifest is missing or invalid.
        """
        path = directory / NAME
        try:
            data: Any = json.loads(path.read_text())
        except OSError as exc:
            raise CheckpointError(
                f"{directory}: no readable {NAME}; give a directory that `fedsplit split` wrote"
            ) from exc
        except (ValueError, RecursionError) as exc:
            raise CheckpointError(f"{path}: not JSON ({exc}); split the model again") from exc
        return _checked(path, data)

    def verify(self, directory: Path) -> None:
        """Compare every file with its hash.

        Raises:
            CheckpointError: A file is missing or has changed.
        """
        for name, expected in self.files.items():
            path = directory / name
            if not path.is_file():
                raise CheckpointError(f"{path}: missing, but {NAME} lists it; copy it again")
            found = sha256_of(path)
            if found != expected:
                raise CheckpointError(
                    f"{path}: sha256 is {found}, but {NAME} says {expected}; copy it again"
                )


def with_digest(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields and, as `digest`, the sha256 in hex of their JSON; replaces an older digest."""
    content = {name: value for name, value in fields.items() if name != _DIGEST}
    return {**content, _DIGEST: hashlib.sha256(json.dumps(content).encode()).hexdigest()}


def has_digest(fields: Mapping[str, Any]) -> bool:
    """Whether the fields, which may have been written to a file and read, have their own digest."""
    return _DIGEST in fields and with_digest(fields)[_DIGEST] == fields[_DIGEST]


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes_of(directory: Path) -> dict[str, str]:
    """sha256 in hex of every file in the directory but the manifest, by name."""
    listed: Iterable[Path] = sorted(directory.iterdir())
    # A process that was killed while it wrote the manifest left `.unfinished-manifest.json`.
    return {p.name: sha256_of(p) for p in listed if p.is_file() and not p.name.endswith(NAME)}


def versions(fedsplit: str) -> dict[str, str]:
    """Versions of fedsplit, transformers and torch, by name."""
    return {
        "fedsplit": fedsplit,
        "transformers": transformers.__version__,
        "torch": str(torch.__version__),
    }


def _checked(path: Path, data: Any) -> Manifest:
    expected = get_type_hints(Manifest)
    if isinstance(data, dict) and data.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format={data.get('format')}; this fedsplit reads {FORMAT}; split the model "
            "again"
        )
    if isinstance(data, dict) and not has_digest(data):
        raise CheckpointError(
            f"{path}: damaged or edited, since its digest is not that of its fields; copy it "
            "again, or split the model again"
        )
    if not isinstance(data, dict) or data.keys() - {_DIGEST} != expected.keys():
        found = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise CheckpointError(f"{path}: has {found}, but needs {sorted(expected)}")
    for name, kind in expected.items():
        if not isinstance(data[name], get_origin(kind) or kind):
            raise CheckpointError(f"{path}: {name}={data[name]!r} is not {kind}")
    if data["part"] not in PARTS:
        raise CheckpointError(f"{path}: part={data['part']!r} is not one of: {', '.join(PARTS)}")
    # A manifest may come from elsewhere; it must not name files outside its directory.
    if any("/" in name for name in data["files"]):
        raise CheckpointError(f"{path}: files must map plain file names to their sha256")
    return Manifest(**{name: data[name] for name in expected})
