"""`python -m tests.edge.jobs`: a sweep whose jobs take no time, for launchers and sweepers."""

import math
import sys
from pathlib import Path

from fedsplit.config import CommandLine
from fedsplit.console import ending_with_an_error_line
from fedsplit.errors import DataError
from fedsplit.runs.folder import RunFolder
from fedsplit.spec import RunSpec

BEST_LR = 0.01


def job(run: RunSpec) -> float:
    """Claim a folder as a run does, and return a value that is least for `BEST_LR`."""
    if run.seed == 13:
        raise DataError("there is no data for seed 13")
    if run.seed == 14:
        raise KeyError("wte")
    folder = RunFolder.claim(Path(run.launch.run_dir), run.name)
    (folder.path / "seed").write_text(str(run.seed))
    (folder.path / "path").write_text(run.data.path)
    return math.log10(run.train.lr / BEST_LR) ** 2


if __name__ == "__main__":
    with ending_with_an_error_line(debug="--debug" in sys.argv):
        # Under its own name, as the jobs of `simulations.run` are in a module of their own.
        from tests.edge.jobs import job as importable

        CommandLine.read(sys.argv[1:]).launch(importable)
