"""Nothing is unpickled in a run: by its trunk, its clients, its checkpoints or its model."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_run_that_is_saved_and_resumed_unpickles_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.edge.audited", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    broken, trained, unpickled, then = done.stdout.splitlines()[-4:]
    assert "the power is gone" in broken
    assert trained.startswith("2 rounds, ")
    assert (unpickled, then) == ("unpickled: []", "then: 1")
