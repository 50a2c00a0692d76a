"""Nothing that a run reads is executed: by its trunk, its clients, its checkpoints or its model."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_run_that_is_saved_and_resumed_executes_nothing(tmp_path: Path) -> None:
    """It unpickles nothing, starts no process, and takes no code from its folder or config."""
    command = [sys.executable, "-m", "tests.edge.audited", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    broken, trained, executed, then = done.stdout.splitlines()[-4:]
    assert "the power is gone" in broken
    assert trained.startswith("2 rounds, ")
    assert executed == "executed: []"
    assert then == "then: compile exec os.system pickle.find_class subprocess.Popen"
