"""A run that kills its own process in its second round, at a point that is named.

Run as a script with a folder and the name of a point.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType

from fedsplit.runs.checkpoint import sha256_of
from fedsplit.runs.folder import RunFolder
from fedsplit.spec import RunSpec
from fedsplit.trunk.compute import Compute
from fedsplit.trunk.versions import ParameterVersions
from tests.edge.federation import federate, spec_for

POINTS: dict[str, tuple[str, CodeType]] = {
    "forward": ("return", Compute.forward.__code__),
    "backward": ("return", Compute.backward.__code__),
    "apply": ("call", ParameterVersions._publish.__code__),
    "checkpoint": ("call", sha256_of.__code__),
}
"""Each is an event of a function: before a reply to a client was sent, between the optimizer's
step and its publication, and with a checkpoint half written."""


def run_in(folder: Path, runs: str) -> RunSpec:
    """A run of three rounds that saves after each of them."""
    words = ("clients=2", "train.rounds=3", "train.local_steps=2", "train.save_every=1")
    return spec_for(folder, *words, f"launch.run_dir={folder / runs}")


def die_at(point: str, folder: RunFolder) -> None:
    """Have this process killed at the point, once the first round has been saved."""
    awaited, code = POINTS[point]
    saved = folder.checkpoints / "round-0001"

    def profile(frame: FrameType, event: str, _: object) -> None:
        if frame.f_code is code and event == awaited and saved.is_dir():
            os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(profile)
    sys.setprofile(profile)


if __name__ == "__main__":
    run = run_in(Path(sys.argv[1]), sys.argv[2])
    die_at(sys.argv[2], RunFolder(Path(run.launch.run_dir) / run.name))
    federate(run)
