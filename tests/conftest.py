"""What every test gets: one thread, no network, no telemetry, quiet libraries, tiny models.

The environment is set before torch, transformers and flwr are imported anywhere, and child
processes (Ray workers, SuperLink, SuperNodes) inherit it.
"""

import gc
import json
import logging
import os
import signal
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    TQDM_DISABLE="1",
    OMP_NUM_THREADS="1",
    FLWR_TELEMETRY_ENABLED="0",
    RAY_USAGE_STATS_ENABLED="0",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
    MPLBACKEND="agg",
)

# A shell starts a background command with these signals ignored, and so would be the runs that
# tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

gc.disable()  # while libraries and tests are imported: it would take a fifth of that time

import pytest
import torch
from hypothesis import settings
from transformers import GPT2Config, LlamaConfig, PretrainedConfig
from transformers import logging as transformers_logging

# Doctests are collected from every module, which is imported for that. These are programs that
# download other suites, and devices that torch cannot forget again.
collect_ignore = ["peers", "core/pretend.py", "core/two_devices.py"]

torch.set_num_threads(1)
transformers_logging.disable_progress_bar()
settings.register_profile("house", deadline=None, derandomize=True, database=None)
settings.load_profile("house")


@pytest.fixture(autouse=True)
def _log_tree():
    """Undo what a program that ran in this process has set at the log."""
    tree = logging.getLogger("fedsplit")
    level, handlers = tree.level, list(tree.handlers)
    yield
    tree.setLevel(level)
    tree.propagate = True
    tree.handlers = handlers


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*.json")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let every worker begin with slow modules: the others would wait for those begun at the end.

    pytest-xdist gives each worker an equal stretch of the list.
    """
    num_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    slow = [item for item in items if item.get_closest_marker("slow")]
    modules = [list(tests) for _, tests in groupby(slow, lambda item: item.path)]
    quick = [item for item in items if item not in set(slow)]
    stretches = [sum(modules[number::num_workers], []) for number in range(num_workers)]
    bounds = [len(items) * number // num_workers for number in range(num_workers + 1)]
    items.clear()
    for stretch, start, end in zip(stretches, bounds, bounds[1:], strict=False):
        missing = max(0, end - start - len(stretch))
        items += stretch + quick[:missing]
        del quick[:missing]
    items += quick


def pytest_collection_finish() -> None:
    """Collect garbage from here on, but not among all that was imported, which takes long."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, object], object]:
    """Gives what tests/golden/<name>.json holds; with --update-golden, writes `got` there first."""

    def read(name: str, got: object) -> object:
        file = Path(__file__).parent / "golden" / f"{name}.json"
        if request.config.getoption("--update-golden"):
            file.write_text(json.dumps(got, indent=2) + "\n", encoding="utf-8")
        return json.loads(file.read_text(encoding="utf-8"))

    return read


TinyConfig = Callable[..., PretrainedConfig]


@pytest.fixture
def tiny_gpt2() -> TinyConfig:
    """Makes the config of a GPT-2 of 4 blocks without dropout; keywords override its fields."""

    def make(**fields: object) -> PretrainedConfig:
        tiny = dict(n_layer=4, n_embd=16, n_head=2, n_positions=64, vocab_size=64)
        quiet = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        ids = dict(bos_token_id=0, eos_token_id=0)
        return GPT2Config(**(tiny | quiet | ids | fields))

    return make


@pytest.fixture
def tiny_llama() -> TinyConfig:
    """Makes the config of a Llama of 4 blocks; keywords override its fields."""

    def make(**fields: object) -> PretrainedConfig:
        tiny = dict(num_hidden_layers=4, hidden_size=16, intermediate_size=32, vocab_size=64)
        heads = dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
        return LlamaConfig(**(tiny | heads | fields))

    return make
