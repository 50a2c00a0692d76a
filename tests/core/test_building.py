"""Threads of one process that build parts at the same time, and one that waits for a download."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedModel

from fedsplit.model import build_client, build_trunk, initial_parts, join_model, split_model
from fedsplit.model.auxiliary import add_auxiliary_head
from fedsplit.model.checkpoint import load_part, split_checkpoint
from fedsplit.model.describe import client_of, parts_of, trunk_of, whole_of
from fedsplit.model.lora import add_adapters, load_adapter, save_adapter
from fedsplit.model.plan import plan_for
from fedsplit.spec import LoraSpec, ModelSpec, RunSpec, SplitSpec
from simulations.families import random_model

SPLIT = SplitSpec.parse("1/2/1")
LORA = LoraSpec(enabled=True, rank=2)
THREADS = 3
ROUNDS = 2


class Material:
    """A tied model in memory and on disk, its parts on disk, and an adapter of it."""

    def __init__(self, config, directory):
        self.config = config
        self.whole = random_model(config)
        self.whole.save_pretrained(directory / "whole")
        self.source = str(directory / "whole")
        self.parts = split_checkpoint(self.source, SPLIT, directory / "parts")
        adapted = split_model(self.whole, SPLIT)
        for part in (adapted.client, adapted.trunk):
            add_adapters(part, LORA, 3)
        self.adapter = str(directory / "adapter")
        save_adapter(adapted.client, adapted.trunk, self.adapter)
        self.new = RunSpec(split=SPLIT, lora=LORA)
        self.pretrained = replace(self.new, model=ModelSpec(pretrained=self.source))

    def client(self):
        return build_client(self.config, SPLIT, source=self.source)

    def with_adapters(self):
        client = self.client()
        add_adapters(client, LORA, 3)
        return client

    def with_loaded_adapter(self):
        client = self.client()
        load_adapter(client, self.adapter)
        return client

    def with_auxiliary_head(self):
        client = self.client()
        add_auxiliary_head(client, "causal_lm", 5)
        return client

    def joined(self):
        parts = split_model(self.whole, SPLIT)
        return join_model(parts.client, parts.trunk)


def _both(parts):
    return torch.nn.ModuleList([parts.client, parts.trunk])


BUILDERS: dict[str, Callable[[Material], torch.nn.Module]] = {
    "split_model of a model": lambda m: _both(split_model(m.whole, SPLIT)),
    "split_model of a directory": lambda m: _both(split_model(m.source, SPLIT)),
    "build_client": lambda m: m.client(),
    "build_trunk": lambda m: build_trunk(m.config, SPLIT, source=m.source),
    "initial_parts": lambda m: _both(initial_parts(m.config, SPLIT, 7)),
    "join_model": lambda m: m.joined(),
    "load_part": lambda m: load_part(m.parts["bottom-top"]),
    "client_of, new": lambda m: client_of(m.new, m.config),
    "client_of, pretrained": lambda m: client_of(m.pretrained, m.config),
    "trunk_of": lambda m: trunk_of(m.pretrained, m.config),
    "parts_of": lambda m: _both(parts_of(m.pretrained, m.config)),
    "whole_of, new": lambda m: whole_of(m.new, m.config),
    "whole_of, pretrained": lambda m: whole_of(m.pretrained, m.config),
    "add_adapters": lambda m: m.with_adapters(),
    "load_adapter": lambda m: m.with_loaded_adapter(),
    "add_auxiliary_head": lambda m: m.with_auxiliary_head(),
}


@pytest.fixture
def material(tiny_gpt2, tmp_path):
    return Material(tiny_gpt2(), tmp_path)


def _at_once(work):
    """What `work` returns in each of the threads, which begin it together, every round."""
    together = threading.Barrier(THREADS)

    def begin(number):
        made = []
        for round in range(ROUNDS):
            together.wait(60)
            made.append(work(number, round))
        return made

    with ThreadPoolExecutor(THREADS) as pool:
        return [made for each in pool.map(begin, range(THREADS)) for made in each]


def _same(module, other):
    state, there = module.state_dict(), other.state_dict()
    return state.keys() == there.keys() and all(torch.equal(t, there[n]) for n, t in state.items())


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_threads_that_build_at_once_get_what_one_alone_gets(material, build):
    alone, before = build(material), _process()
    assert all(_same(alone, made) for made in _at_once(lambda *_: build(material)))
    assert all(a is b for a, b in zip(before, _process(), strict=True))


def _process():
    """What a build replaces in the whole process."""
    methods = PreTrainedModel.init_weights, PreTrainedModel.tie_weights
    functions = torch.nn.init.normal_, torch.nn.Module.register_parameter, torch.linspace
    return (*methods, *functions, torch.get_default_dtype())


def test_threads_that_plan_at_once_find_the_same_plan(tiny_gpt2):
    wanted = plan_for(GPT2LMHeadModel, tiny_gpt2())

    def plan(number, round):  # another vocabulary is another question
        config = tiny_gpt2(vocab_size=100 + THREADS * round + number)
        return plan_for(GPT2LMHeadModel, config)

    assert all(found == wanted for found in _at_once(plan))


SLOW_HUB = """
import gc, http.server, os, sys, threading
gc.disable()  # it would take a fifth of the time of the imports
from pathlib import Path
from tests.core.hubs import hub_of

files, downloads = Path(sys.argv[1]), {}

def wait(path):
    if path.endswith(".safetensors"):
        asked, done = downloads[path.split("/")[2]]
        asked.set()
        done.wait()

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), hub_of(files, wait))
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"

import torch
from dataclasses import replace
from transformers import AutoConfig
from fedsplit.model.describe import client_of, trunk_of, whole_of
from fedsplit.spec import ModelSpec, RunSpec, SplitSpec

config = AutoConfig.from_pretrained(files)
run = RunSpec(split=SplitSpec.parse("1/2/1"))

def show(build, run):
    print(build.__name__, run.model.pretrained, type(build(run, config)).__name__, flush=True)

for name, build in {"a": client_of, "b": trunk_of, "c": whole_of}.items():
    asked, done = downloads[name] = threading.Event(), threading.Event()
    hosted = replace(run, model=ModelSpec(pretrained=f"somebody/{name}"))
    slow = threading.Thread(target=show, args=(build, hosted))
    slow.start()
    asked.wait()
    other = threading.Thread(target=show, args=(client_of, run))
    other.start()
    other.join(20)
    print("downloaded", flush=True)
    done.set()
    slow.join()
    other.join()
"""


def test_others_build_while_a_model_is_downloaded(tiny_gpt2, tmp_path):
    random_model(tiny_gpt2()).save_pretrained(tmp_path / "hub")
    online = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    online |= {"HF_HOME": str(tmp_path / "home")}
    told = subprocess.run(
        [sys.executable, "-c", SLOW_HUB, str(tmp_path / "hub")],
        capture_output=True, text=True, timeout=120, env={**os.environ, **online},
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    lines = []
    for build in ("client_of somebody/a", "trunk_of somebody/b", "whole_of somebody/c"):
        lines += ["client_of  GPT2LMHeadModel", "downloaded", f"{build} GPT2LMHeadModel"]
    assert told.stdout.splitlines() == lines
