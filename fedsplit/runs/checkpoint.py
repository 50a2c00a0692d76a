"""Checkpoints: the state from which the server and the clients resume a run.

A checkpoint is a folder with safetensors files and a `checkpoint.json` that has the sha256 of each,
and one of itself. It is written atomically (`fedsplit.atomic`): it is complete or absent. The
folder of the server's is named after the round, as `round-0007`. A client's name also has the
random id of its state, by which the server names the state to continue from.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fedsplit import atomic
from fedsplit.errors import CheckpointError, ConfigError
from fedsplit.model.manifest import has_digest, sha256_of, with_digest
from fedsplit.spec import RunSpec

FORMAT = 6
"""Version of a checkpoint's layout; checkpoints of format 1 have no number in their label."""

_LABEL = "checkpoint.json"
_SUFFIX = ".safetensors"
_NAME = re.compile(r"round-([0-9]{4,})(?:-([0-9a-f]{16}))?")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """The state of one side, the server or a client, after a round.

    Attributes:
        round: The number of the round.
        owner: The run and the side that it belongs to.
        settings: The settings that decide the run's numbers.
        facts: Single values of the state.
        tensors: Groups of tensors by name; each group is one file.
        state: The id of a client's state; 0 for the server's.
    """

    round: int
    owner: str
    settings: dict[str, Any]
    facts: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    state: int = 0

    def write(self, parent: Path) -> Path:
        """Write the checkpoint into `parent`; it replaces one of the same round and state.

        Returns:
            The folder of the checkpoint.

        Raises:
            StorageError: A file cannot be written.
        """
        final = parent / _name(self.round, self.state)
        with atomic.new_folder(final) as unfinished:
            for name, group in self.tensors.items():
                # safetensors writes only contiguous tensors.
                group = {key: value.detach().cpu().contiguous() for key, value in group.items()}
                save_file(group, unfinished / f"{name}{_SUFFIX}")
            label = {
                "format": FORMAT,
                "round": self.round,
                "state": self.state,
                "owner": self.owner,
                "settings": self.settings,
                "facts": self.facts,
                "files": {path.name: sha256_of(path) for path in sorted(unfinished.iterdir())},
            }
            text = json.dumps(with_digest(label), indent=1)
            (unfinished / _LABEL).write_text(text, encoding="utf-8")
        return final

    @staticmethod
    def read(path: Path, run: RunSpec, owner: str, groups: Collection[str]) -> "Checkpoint":
        """Read a checkpoint of a run with the same settings.

        Args:
            path: Its folder.
            run: The settings.
            owner: The owner that it was written for.
            groups: The names of its groups of tensors.

        Raises:
            CheckpointError: A file is missing or damaged, as its sha256 in the label shows, or the
                folder is that of another round or state, or the checkpoint is that of another
                owner.
            ConfigError: The checkpoint was written with other settings; the text lists them.
        """
        label = _label(path, groups)
        if (path.name, owner) != (_name(label["round"], label["state"]), label["owner"]):
            raise CheckpointError(
                f"{path} holds round {label['round']} of {label['owner']}, but this folder is for "
                f"{path.name} of {owner}; move it back to its place, or remove it to resume from "
                "the one before it"
            )
        # Before the files are hashed, which takes long for large models.
        _check_settings(path, label["settings"], run.settings)
        for name, expected in label["files"].items():
            if not (path / name).is_file() or sha256_of(path / name) != expected:
                raise CheckpointError(
                    f"{path / name} is missing or damaged (its sha256 is not the one in {_LABEL}); "
                    f"remove {path} to resume from the checkpoint before it"
                )
        tensors = {Path(name).stem: load_file(path / name) for name in label["files"]}
        kept = {name: label[name] for name in ("round", "state", "owner", "settings", "facts")}
        return Checkpoint(**kept, tensors=tensors)


def checkpoints_in(parent: Path) -> dict[int, Path]:
    """Return the server's checkpoints in a folder by their round, oldest first."""
    return {number: path for number, state, path in _folders(parent) if not state}


def states_in(parent: Path) -> dict[int, Path]:
    """Return a client's checkpoints in a folder by the id of their state, oldest round first."""
    return {state: path for _, state, path in _folders(parent) if state}


def facts_of(path: Path, groups: Collection[str]) -> dict[str, Any]:
    """Return the facts of a checkpoint without reading its tensors.

    Raises:
        CheckpointError: Its label is missing or damaged.
    """
    facts: dict[str, Any] = _label(path, groups)["facts"]
    return facts


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


def prune_states(parent: Path, kept: Collection[int]) -> None:
    """Remove the client's checkpoints of all other states."""
    for state, path in states_in(parent).items():
        if state not in kept:
            atomic.remove(path)


def _folders(parent: Path) -> list[tuple[int, int, Path]]:
    """Return the checkpoints in a folder with round and state, oldest first."""
    found = []
    for path in parent.glob("round-*"):
        if match := _NAME.fullmatch(path.name):
            number, state = int(match[1]), int(match[2] or "0", 16)
            # No other name of the same number, such as round-00007.
            if path.name == _name(number, state) and (path / _LABEL).is_file():
                found.append((number, state, path))
    return sorted(found)


def _name(number: int, state: int) -> str:
    return f"round-{number:04d}" + (f"-{state:016x}" if state else "")


def _label(path: Path, groups: Collection[str]) -> dict[str, Any]:
    try:
        label: dict[str, Any] = json.loads((path / _LABEL).read_text(encoding="utf-8"))
        if not label.keys() >= {"round", "settings", "facts", "files"}:
            raise ValueError(f"it has the keys {sorted(label)}")
    except (OSError, ValueError, AttributeError, RecursionError) as exc:
        raise CheckpointError(
            f"{path} is no checkpoint of a run: {exc}; remove it to resume from the one before it"
        ) from exc
    if (found := label.get("format", 1)) != FORMAT:
        raise CheckpointError(
            f"{path} is a checkpoint of format {found}, and this version reads {FORMAT}; "
            "resume the run with the version that it began with, or start a new run"
        )
    if not has_digest(label):
        raise CheckpointError(
            f"{path / _LABEL} is damaged or edited (its digest is not that of its fields); remove "
            f"{path} to resume from the checkpoint before it"
        )
    # No other name becomes a path.
    if label["files"].keys() != (files := {f"{group}{_SUFFIX}" for group in groups}):
        raise CheckpointError(
            f"{path / _LABEL} names the files {sorted(label['files'])}, but the checkpoint needs "
            f"{sorted(files)}; remove {path} to resume from the checkpoint before it"
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
