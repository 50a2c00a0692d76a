"""A tiny federation in this process: its text, its settings, its run and what a round did."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsplit.config import changed, compose, to_yaml
from fedsplit.config.overrides import is_group
from fedsplit.data import Batch, hold_out, load_corpus, shard, tokenize, training_batches
from fedsplit.flower import client_app, server_app
from fedsplit.flower.inline import run_inline
from fedsplit.runs.folder import RunFolder
from fedsplit.spec import RunSpec
from fedsplit.telemetry.round import RoundStats

WORDS = "the of and to in is that it was for on are as with his they at be this from".split()
TINY = (
    "name=tiny",
    "clients=3",
    "data=text",
    "data.sequence_length=16",
    "data.vocabulary=300",
    "model.config.n_embd=16",
    "model.config.n_head=2",
    "model.config.n_positions=32",
    "train=toy",
    "train.rounds=1",
    "train.local_steps=1",
    "policy.deadline_s=60",
)
SGD = (
    "train.optimizer=sgd",
    "train.momentum=0",
    "train.lr=0.5",
    "train.clip_norm=0",
    "train.schedule=constant",
    "train.warmup_steps=0",
)


def write_corpus(folder: Path, documents: int = 40) -> Path:
    """A text file with a document a line; the same in every test."""
    chance = random.Random(0)
    lines = (" ".join(chance.choices(WORDS, k=chance.randint(20, 60))) for _ in range(documents))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "corpus.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def overrides_for(folder: Path, *overrides: str) -> list[str]:
    """The overrides of a tiny run whose text and results are in `folder`."""
    text = write_corpus(folder)
    return [*TINY, f"data.path={text}", f"launch.run_dir={folder / 'runs'}", *overrides]


def spec_for(folder: Path, *overrides: str) -> RunSpec:
    """A tiny run whose text and results are in `folder`."""
    words = overrides_for(folder, *overrides)
    groups = tuple(word for word in words if is_group(word.partition("=")[0]))
    return changed(_composed(groups), [word for word in words if word not in groups])


@lru_cache
def _composed(groups: tuple[str, ...]) -> RunSpec:
    # To compose a run takes as long as a round of it, and many tests choose the same groups.
    return compose([*groups, "data.path=none yet"])


def run_config(run: RunSpec) -> dict[str, str]:
    """What a driver hands to Flower."""
    return {"config": to_yaml(run), "run-dir": run.launch.run_dir}


def federate(run: RunSpec, client: ClientApp = client_app.app) -> RunFolder:
    """Train in this process; the folder that the run leaves."""
    run_inline(
        server_app.app,
        client,
        num_clients=run.num_nodes,
        run_config=run_config(run),
        workers=run.launch.workers,
    )
    folders = Path(run.launch.run_dir).iterdir()
    return RunFolder(max(folders, key=lambda path: path.stat().st_mtime_ns))


def client_that(**doing: Any) -> ClientApp:
    """The product's client app; `train=f` has f(message, context, go_on) stand before it.

    `evaluate=f` does so too.
    """

    def before(name: str, work: Callable[[Message, Context], Message]) -> Any:
        def answer(message: Message, context: Context) -> Message:
            go_on = partial(work, message, context)
            reply: Message = doing[name](message, context, go_on) if name in doing else go_on()
            return reply

        return answer

    app = ClientApp()
    app.query("hello")(client_app.hello)
    app.train()(before("train", client_app.train))
    app.evaluate()(before("evaluate", client_app.evaluate))
    return app


def without_seconds(rounds: list[RoundStats]) -> list[RoundStats]:
    """Rounds without what the machine's speed decides."""
    return [replace(stats, seconds=0.0) for stats in rounds]


def joined(folder: RunFolder) -> dict[str, Tensor]:
    """The weights of the joined model that a run left."""
    model = AutoModelForCausalLM.from_pretrained(folder.path / "model")
    state: dict[str, Tensor] = model.state_dict()
    return state


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Over all entries of all tensors."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def union_of_batches(run: RunSpec, tokenizer: Any, round: int) -> list[Batch]:
    """What all clients of `run` train on in a round (from 1) of one local step."""
    training, _ = hold_out(load_corpus(run.data), run.data.held_out, run.seed)
    shards = shard(training, run.sharding, run.clients, run.seed)
    size = run.train.batch_size
    return [
        batch
        for piece in shards
        for batch in training_batches(
            tokenize(piece, tokenizer, run.data),
            batch_size=size,
            num_batches=1,
            seed=run.seed,
            start=round - 1,
        )
    ]


def sgd_step(model: torch.nn.Module, batches: list[Batch], lr: float) -> float:
    """One step on the mean over all tokens of all batches; the loss before it."""
    tokens = sum(batch.num_tokens for batch in batches)
    total = 0.0
    for batch in batches:
        loss = model(
            **batch.inputs,
            labels=batch.labels,
            use_cache=False,
        ).loss * (batch.num_tokens / tokens)
        loss.backward()
        total += loss.item()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad
                parameter.grad = None
    return total


def metrics_lines(folder: RunFolder) -> list[dict[str, Any]]:
    """`metrics.jsonl` as any reader of JSON lines sees it."""
    text = (folder.path / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
