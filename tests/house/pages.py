"""Run the tests that pages add, each in the tree that its page has changed.

python pages.py JSON, which maps a folder to its tests. What pytest prints is in the folder's file
`pytest.out`. The exit status is the number of folders whose tests fail.
"""

import gc
import json
import os
import sys
from importlib import import_module

# A test process spends most of its time importing these, so a fork for each folder shares them.
LIBRARIES = (
    "flwr.app",
    "flwr.serverapp",
    "grpc_health.v1.health",
    "hydra.experimental.callback",
    "hydra.main",
    "hypothesis.strategies",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "peft",
    "pytest",
    "torch",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)


def start(folder: str, tests: list[str]) -> int:
    """Start the tests of a folder; return the process id."""
    if process := os.fork():
        return process
    os.chdir(folder)
    output = os.open("pytest.out", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.path[0] = folder
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    code = import_module("pytest").main([*options, *tests])
    sys.stdout.flush()
    os._exit(code)


def passes(folder: str, tests: list[str]) -> bool:
    """Run the tests of a folder; return whether all of them pass."""
    return os.waitpid(start(folder, tests), 0)[1] == 0


if __name__ == "__main__":
    gc.disable()
    for name in LIBRARIES:
        import_module(name)
    gc.freeze()  # else the first collection in each fork goes through all that is imported
    gc.enable()
    assert "fedsplit" not in sys.modules, "a fork must import it from its own folder"
    tests_of = json.loads(sys.argv[1])
    sys.exit(sum(not passes(folder, tests) for folder, tests in tests_of.items()))
