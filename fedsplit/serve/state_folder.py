"""A folder with the last states of a trunk or a client, each a checkpoint with a number."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsplit import atomic
from fedsplit.errors import CheckpointError
from fedsplit.runs.checkpoint import Checkpoint, checkpoints_in, prune, remove_after
from fedsplit.spec import RunSpec

StateTensors = dict[str, dict[str, Tensor]]


class StateFolder:
    """Keeps the last states of one owner; implements `fedsplit.client.rollback.StateStore`.

    The number of a state is a version of the trunk, and its folder is named after it, as
    `round-0012`. A state is complete or absent, also after a kill.

    Args:
        folder: The folder; nothing else writes to it.
        run: The run; states of a run with other settings are refused.
        owner: The name of the trunk or the client; states of others are refused.
        keep: The number of states to keep. A client needs four: its trunk has two, and the client
            may be two ahead of the newest one.

    Raises:
        StorageError: The folder cannot be made.
    """

    def __init__(self, folder: Path | str, run: RunSpec, owner: str, *, keep: int = 4) -> None:
        self.folder = Path(folder)
        self._run = run
        self._owner = owner
        self._keep = keep
        atomic.make_folder(self.folder)
        atomic.recover(self.folder)

    @property
    def numbers(self) -> list[int]:
        """The numbers of the states that are kept, in ascending order."""
        return list(checkpoints_in(self.folder))

    def save(self, number: int, facts: Mapping[str, Any], tensors: StateTensors) -> None:
        """Write a state, and remove the oldest ones above the number to keep.

        Raises:
            StorageError: It cannot be written; the states before it are unchanged.
        """
        Checkpoint(
            round=number,
            owner=self._owner,
            settings=self._run.settings,
            facts=dict(facts),
            tensors=tensors,
        ).write(self.folder)
        prune(self.folder, self.numbers[-self._keep :][0])

    def load(self, number: int, groups: tuple[str, ...]) -> tuple[dict[str, Any], StateTensors]:
        """Return the facts and the tensors of a state.

        Raises:
            CheckpointError: It is missing or damaged, or of another owner.
            ConfigError: It was written with other settings.
        """
        path = checkpoints_in(self.folder).get(number)
        if path is None:
            raise CheckpointError(f"{self.folder} has no state {number}; it has {self.numbers}")
        found = Checkpoint.read(path, self._run, self._owner, groups)
        return found.facts, found.tensors

    def remove_after(self, number: int) -> None:
        """Remove the states above a number; -1 removes all.

        Raises:
            StorageError: A state cannot be removed.
        """
        remove_after(self.folder, number)
