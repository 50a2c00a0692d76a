"""Run the commands of pages, each in the tree that its page has changed.

python pages.py JSON, which maps a folder to its tasks, each a module and its arguments. What they
print is in the folder's file `output`. The folders with a failure are printed, a line each.
"""

import gc
import json
import os
import runpy
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


def start(folder: str, tasks: list[list[str]]) -> int:
    """Start the tasks of a folder; return the process id."""
    if process := os.fork():
        return process
    os.chdir(folder)
    output = os.open("output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.path[0] = folder
    options = "-q -p no:cacheprovider -W ignore::pytest.PytestAssertRewriteWarning"
    os.environ["PYTEST_ADDOPTS"] = options
    try:
        codes = [code_of(module, *arguments) for module, *arguments in tasks]
    finally:
        sys.stdout.flush()
    os._exit(any(codes))


def code_of(module: str, *arguments: str) -> int:
    """Run a module; return its exit status."""
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def passes(folder: str, tasks: list[list[str]]) -> bool:
    """Run the tasks of a folder; return whether none of them fails."""
    return os.waitpid(start(folder, tasks), 0)[1] == 0


if __name__ == "__main__":
    gc.disable()
    for name in LIBRARIES:
        import_module(name)
    gc.freeze()  # else the first collection in each fork goes through all that is imported
    gc.enable()
    assert "fedsplit" not in sys.modules, "a fork must import it from its own folder"
    tasks_in = json.loads(sys.argv[1])
    print(*(folder for folder, tasks in tasks_in.items() if not passes(folder, tasks)), sep="\n")
