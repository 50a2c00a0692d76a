"""Checkpoints: the state from which the server and the clients resume a run.

A checkpoint is a folder such as `round-0007`, with safetensors files and a `checkpoint.json` that
has the sha256 of each. It is written atomically (`fedsplit.atomic`): it is complete or absent.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fedsplit import atomic
from fedsplit.errors import CheckpointError, ConfigError
from fedsplit.model.manifest import sha256_of
from fedsplit.spec import RunSpec

FORMAT = 3
"""Version of a checkpoint's layout; checkpoints of format 1 have no number in their label."""

_LABEL = "checkpoint.json"
_PREFIX = "round-"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """The state of one side, the server or a client, after a round.

    Attributes:
        round: The number of the round.
        settings: The settings that decide the run's numbers.
        facts: Single values of the state.
        tensors: Groups of tensors by name; each group is one file.
    """

    round: int
    settings: dict[str, Any]
    facts: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]

    def write(self, parent: Path) -> Path:
        """Write the checkpoint into `parent`; it replaces one of the same round.

        Returns:
            The folder of the checkpoint.

        Raises:
            StorageError: A file cannot be written.
        """
        final = parent / f"{_PREFIX}{self.round:04d}"
        with atomic.new_folder(final) as unfinished:
            for name, group in self.tensors.items():
                # safetensors writes only contiguous tensors.
                group = {key: value.detach().cpu().contiguous() for key, value in group.items()}
                save_file(group, unfinished / f"{name}.safetensors")
            label = {
                "format": FORMAT,
                "round": self.round,
                "settings": self.settings,
                "facts": self.facts,
                "files": {path.name: sha256_of(path) for path in sorted(unfinished.iterdir())},
            }
            (unfinished / _LABEL).write_text(json.dumps(label, indent=1), encoding="utf-8")
        return final

    @staticmethod
    def read(path: Path, run: RunSpec) -> "Checkpoint":
        """Read a checkpoint of a run with the same settings.

        Raises:
            CheckpointError: A file is missing, or its sha256 differs from the one in the label.
            ConfigError: The checkpoint was written with other settings; the text lists them.
        """
        label = _label(path)
        # Before the files are hashed, which takes long for large models.
        _check_settings(path, label["settings"], run.settings)
        for name, expected in label["files"].items():
            if not (path / name).is_file() or sha256_of(path / name) != expected:
                raise CheckpointError(
                    f"{path / name} is missing or damaged (its sha256 is not the one in {_LABEL}); "
                    f"remove {path} to resume from the checkpoint before it"
                )
        tensors = {Path(name).stem: load_file(path / name) for name in label["files"]}
        return Checkpoint(
            round=label["round"], settings=label["settings"], facts=label["facts"], tensors=tensors
        )


def checkpoints_in(parent: Path) -> dict[int, Path]:
    """Return the checkpoints in a folder by their round, oldest first."""
    return dict(sorted(_folders(parent)))


def prune(parent: Path, oldest_needed: int) -> None:
    """Remove the checkpoints that are not needed to resume from round `oldest_needed` or later."""
    checkpoints = checkpoints_in(parent)
    # There may be no checkpoint of this very round; then the last one before it is needed.
    needed = max((number for number in checkpoints if number <= oldest_needed), default=0)
    for number, path in checkpoints.items():
        if number < needed:
            atomic.remove(path)


def remove_after(parent: Path, number: int) -> None:
    """Remove the checkpoints of the rounds after `number`, which a resumed run repeats."""
    for later, path in checkpoints_in(parent).items():
        if later > number:
            atomic.remove(path)


def _folders(parent: Path) -> Iterator[tuple[int, Path]]:
    for path in parent.glob(f"{_PREFIX}*"):
        number = path.name.removeprefix(_PREFIX)
        if number.isdigit() and (path / _LABEL).is_file():
            yield int(number), path


def _label(path: Path) -> dict[str, Any]:
    try:
        label: dict[str, Any] = json.loads((path / _LABEL).read_text(encoding="utf-8"))
        if not label.keys() >= {"round", "settings", "facts", "files"}:
            raise ValueError(f"it has the keys {sorted(label)}")
    except (OSError, ValueError, AttributeError) as exc:
        raise CheckpointError(
            f"{path} is no checkpoint of a run: {exc}; remove it to resume from the one before it"
        ) from exc
    if (found := label.get("format", 1)) != FORMAT:
        raise CheckpointError(
            f"{path} is a checkpoint of format {found}, and this version reads {FORMAT}; "
            "resume the run with the version that it began with, or start a new run"
        )
    return label


def _check_settings(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    if changed:
        changes = ", ".join(f"{key} was {then.get(key)!r}, is {now.get(key)!r}" for key in changed)
        raise ConfigError(
            f"{path} was made with other settings: {changes}; resume with the same ones, or start "
            "a new run from its model with model.pretrained="
        )
