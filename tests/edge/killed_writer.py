"""Writers of a checkpoint of one round, each killed before a later operation on files.

Run as a script with an empty folder. For each writer it prints the version that is read afterwards.
"""

import itertools
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from fedsplit import atomic
from fedsplit.runs.checkpoint import Checkpoint
from fedsplit.spec import RunSpec

_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
_OWNER = "server/00000000000000aa"


def versions_after_kills(folder: Path) -> Iterator[str]:
    """Yield the version that is left by a writer killed before each of its operations."""
    for number in itertools.count(1):
        path = _checkpoint("old").write(folder)
        writer = os.fork()
        if not writer:
            _die_before(number)
            _checkpoint("new").write(folder)
            os._exit(0)
        status = os.waitpid(writer, 0)[1]
        atomic.recover(folder)
        assert list(folder.iterdir()) == [path], "a temporary folder is left"
        found = Checkpoint.read(path, RunSpec(), _OWNER, ["trunk"])
        assert found.tensors == _checkpoint(found.facts["version"]).tensors
        yield found.facts["version"]
        if status == 0:
            return
        shutil.rmtree(path)


def _checkpoint(version: str) -> Checkpoint:
    return Checkpoint(
        round=2,
        owner=_OWNER,
        settings=RunSpec().settings,
        facts={"version": version},
        tensors={"trunk": {version: torch.tensor(1)}},
    )


def _die_before(number: int) -> None:
    """End this process before the operation of this number."""
    numbers = itertools.count(1)

    def hook(event: str, _: object) -> None:
        if event in _OPERATIONS and next(numbers) == number:
            os._exit(1)

    sys.addaudithook(hook)


if __name__ == "__main__":
    for version in versions_after_kills(Path(sys.argv[1])):
        print(version)
