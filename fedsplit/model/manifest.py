"""The manifest of a part's directory: what it is a part of, and the hash of every file."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import torch
import transformers

from fedsplit import atomic
from fedsplit.errors import CheckpointError

NAME = "manifest.json"
FORMAT = 1
PARTS = ("bottom-top", "trunk")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        format: Version of this layout.
        part: "bottom-top" (the client's) or "trunk".
        model: The local directory or hub id that was split.
        revision: The commit of a hub id; empty for a directory.
        model_class: Name of the family's class in transformers.
        split: Blocks of bottom, trunk and top.
        trunk_blocks: First block of the trunk, and first block after it.
        fingerprint: Equal for both parts of one cut of one model.
        versions: Of fedsplit, transformers and torch, for people; nothing is decided on them.
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
    versions: dict[str, str]
    files: dict[str, str]

    def write(self, directory: Path) -> None:
        """Write it so that a reader sees all of it or none."""
        atomic.write_text(directory / NAME, json.dumps(asdict(self), indent=2))

    @staticmethod
    def read(directory: Path) -> "Manifest":
        """The manifest of a part's directory.

        Raises:
            CheckpointError: There is none, or it is not one.
        """
        path = directory / NAME
        try:
            told: Any = json.loads(path.read_text())
        except OSError as exc:
            raise CheckpointError(
                f"{directory}: no readable {NAME}; a part's directory is what `fedsplit split` "
                "writes, one for each side"
            ) from exc
        except ValueError as exc:
            raise CheckpointError(f"{path}: not JSON ({exc}); split the model again") from exc
        return _checked(path, told)

    def verify(self, directory: Path) -> None:
        """Compare every file with its hash.

        Raises:
            CheckpointError: A file is missing or is not the one that was written.
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


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes_of(directory: Path) -> dict[str, str]:
    """sha256 of every file that a manifest lists."""
    listed: Iterable[Path] = sorted(directory.iterdir())
    return {p.name: sha256_of(p) for p in listed if p.is_file() and not p.name.startswith(NAME)}


def versions(fedsplit: str) -> dict[str, str]:
    """Versions of the libraries at work."""
    return {
        "fedsplit": fedsplit,
        "transformers": transformers.__version__,
        "torch": str(torch.__version__),
    }


def _checked(path: Path, told: Any) -> Manifest:
    expected = get_type_hints(Manifest)
    if not isinstance(told, dict) or set(told) != set(expected):
        there = sorted(told) if isinstance(told, dict) else type(told).__name__
        raise CheckpointError(f"{path}: has {there}, but needs {sorted(expected)}")
    for name, kind in expected.items():
        if not isinstance(told[name], get_origin(kind) or kind):
            raise CheckpointError(f"{path}: {name}={told[name]!r} is not {kind}")
    if told["format"] != FORMAT:
        raise CheckpointError(f"{path}: format={told['format']}; this fedsplit reads {FORMAT}")
    if told["part"] not in PARTS:
        raise CheckpointError(f"{path}: part={told['part']!r} is not one of: {', '.join(PARTS)}")
    if any("/" in name for name in told["files"]):
        raise CheckpointError(f"{path}: files must map plain file names to their sha256")
    return Manifest(**told)
