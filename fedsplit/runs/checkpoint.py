"""Checkpoints of a run's state: what server and clients go on from when a run is resumed.

A checkpoint is a folder `round-0007` of safetensors files and a `checkpoint.json` with the sha256
of each. It is written atomically (`fedsplit.atomic`), so it is whole or not there at all.
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

FORMAT = 2
"""Version of a checkpoint's layout; checkpoints of the first had no number."""

_LABEL = "checkpoint.json"
_PREFIX = "round-"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """The state of one side after a round.

    `settings` are those that decide the run's numbers, `facts` are single values, and `tensors`
    groups of tensors by name; each group is a file.
    """

    round: int
    settings: dict[str, Any]
    facts: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]

    def write(self, parent: Path) -> Path:
        """Write the checkpoint into `parent`, in place of one of the same round."""
        final = parent / f"{_PREFIX}{self.round:04d}"
        with atomic.new_folder(final) as unfinished:
            for name, group in self.tensors.items():
                kept = {key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}
                save_file(kept, unfinished / f"{name}.safetensors")
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
            CheckpointError: A file is missing or is not the one that was written.
            ConfigError: The run it was made in had other settings; names each.
        """
        told = _label(path)
        _check_settings(path, told["settings"], run.settings)
        for name, expected in told["files"].items():
            if not (path / name).is_file() or sha256_of(path / name) != expected:
                raise CheckpointError(
                    f"{path / name} is missing or damaged (its sha256 is not the one in {_LABEL}); "
                    f"remove {path} to go on from the checkpoint before it"
                )
        tensors = {Path(name).stem: load_file(path / name) for name in told["files"]}
        return Checkpoint(
            round=told["round"], settings=told["settings"], facts=told["facts"], tensors=tensors
        )


def checkpoints_in(parent: Path) -> dict[int, Path]:
    """The checkpoints in a folder by their round, oldest first."""
    return dict(sorted(_found(parent)))


def prune(parent: Path, oldest_needed: int) -> None:
    """Remove the checkpoints that nobody who goes on from round `oldest_needed` needs."""
    found = checkpoints_in(parent)
    needed = max((number for number in found if number <= oldest_needed), default=0)
    for number, path in found.items():
        if number < needed:
            atomic.remove(path)


def remove_after(parent: Path, number: int) -> None:
    """Remove the checkpoints of the rounds after `number`, which a resumed run does again."""
    for later, path in checkpoints_in(parent).items():
        if later > number:
            atomic.remove(path)


def _found(parent: Path) -> Iterator[tuple[int, Path]]:
    for path in parent.glob(f"{_PREFIX}*"):
        number = path.name.removeprefix(_PREFIX)
        if number.isdigit() and (path / _LABEL).is_file():
            yield int(number), path


def _label(path: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads((path / _LABEL).read_text(encoding="utf-8"))
        if not told.keys() >= {"round", "settings", "facts", "files"}:
            raise ValueError(f"it has the keys {sorted(told)}")
    except (OSError, ValueError, AttributeError) as exc:
        raise CheckpointError(f"{path} is no checkpoint of a run: {exc}") from exc
    if (found := told.get("format", 1)) != FORMAT:
        raise CheckpointError(
            f"{path} is a checkpoint of format {found}, and this version reads {FORMAT}; "
            "resume the run with the version that it began with, or begin it anew"
        )
    return told


def _check_settings(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    odd = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    if odd:
        changes = ", ".join(f"{key} was {then.get(key)!r}, is {now.get(key)!r}" for key in odd)
        raise ConfigError(
            f"{path} was made with other settings: {changes}; resume with the same ones, or start "
            "a new run from its model with model.pretrained="
        )
