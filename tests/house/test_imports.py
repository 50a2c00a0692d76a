"""Who may import whom; and importing does nothing."""

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from runpy import run_path

from tests.house.source import CORE, FILES, ROOT, module, require_none, tree

IMPORT_CORE = "\n".join(f"import {module(file)}" for file in CORE)
LIBRARIES = {"torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "tokenizers"}
LIBRARIES |= {"cryptography"}  # AES, which torch does not have
LIBRARIES |= {"huggingface_hub", "jinja2"}  # whose errors transformers lets through
EXTRAS = {  # imported by the function that needs them
    "fedsplit/data/sources.py": {"sklearn"},
    "fedsplit/data/records.py": {"datasets"},
    "fedsplit/data/partitioners.py": {"datasets", "flwr_datasets"},
    "fedsplit/optimization.py": {"bitsandbytes"},
    "fedsplit/telemetry/prometheus.py": {"prometheus_client"},
    "fedsplit/telemetry/otlp.py": {"opentelemetry"},
    "fedsplit/telemetry/logs.py": {"ecs_logging"},  # no extra, but only for JSON
}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def alone(statement: str) -> subprocess.CompletedProcess[str]:
    return python("-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{statement}")


def without_doors(statement: str) -> subprocess.CompletedProcess[str]:
    file = str(Path(__file__).with_name("alone.py"))
    return python(file, f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{statement}")


def test_import_contracts_hold():
    run = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"
    done = python("-c", run)
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_doors_cannot_be_imported_without_their_libraries():
    done = without_doors("import fedsplit.config")
    assert "the core needs hydra" in done.stderr


def test_the_core_imports_few_libraries():
    found = ((file, line, name) for file in CORE for line, name in imported(tree(file)))
    require_none(
        (
            f"{file}:{line}: {name}"
            for file, line, name in found
            if name not in {"fedsplit"} | sys.stdlib_module_names | LIBRARIES
            and name not in EXTRAS.get(file, set())
        ),
        f"move it to a door; the core has only {', '.join(sorted(LIBRARIES))}",
    )


def imported(code: ast.AST) -> Iterator[tuple[int, str]]:
    """The top-level packages that code imports, each with its line."""
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module.partition(".")[0]


def test_no_test_imports_from_another_test():
    tests = sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "tests").rglob("*.py"))
    found = ((file, node) for file in tests for node in ast.walk(tree(file)))
    require_none(
        (
            f"{file}:{node.lineno}: {node.module}"
            for file, node in found
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests.")
            if (node.module or "").rpartition(".")[2].startswith("test_")
        ),
        "move what both need to a module without tests",
    )


def test_importing_fedsplit_imports_nothing_heavy():
    done = alone("import fedsplit; print(*{n.partition('.')[0] for n in sys.modules})")
    loaded = set(done.stdout.split())
    assert "fedsplit" in loaded
    assert not loaded & {"torch", "transformers", "peft", "flwr", "hydra", "grpc", "numpy"}


def test_the_core_imports_without_effect_and_trains_a_step_without_the_doors():
    done = without_doors(
        textwrap.dedent(
            """
            import gc, logging, os, random, sys, threading, warnings
            gc.disable()  # it would take a fifth of the time of the imports
            import peft, tokenizers, torch, transformers
            def state():
                return {
                    "environment": dict(os.environ),
                    "threads": threading.active_count(),
                    "random": (random.getstate(), torch.get_rng_state().tolist()),
                    "torch": (torch.get_num_threads(), torch.get_default_dtype()),
                    "grad": torch.is_grad_enabled(),
                    "handlers": list(logging.getLogger().handlers),
                    "filters": list(warnings.filters),
                    "path": list(sys.path),
                }
            before = state()
            """
        )
        + IMPORT_CORE
        + textwrap.dedent(
            """
            after = state()
            print([k for k in before if before[k] != after[k]])
            import simulations.bench.__main__, simulations.bench.accelerate
            from simulations.one_step import main
            main()
            """
        )
    )
    changed, *printed = done.stdout.splitlines()
    assert (done.returncode, done.stderr, changed) == (0, "", "[]")
    assert "loss" in "\n".join(printed)


def test_a_simulation_runs_only_when_it_is_run(capfd, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # which one sets where it is not
    for file in FILES:
        if file.startswith("simulations/"):
            run_path(str(ROOT / file), run_name=module(file))
    assert capfd.readouterr() == ("", "")
