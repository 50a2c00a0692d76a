"""Trains the unsplit and the split model on the same batches, and prints how much they differ.

    python -m simulations.parity family=llama steps=20 link=grpc
    python -m simulations.parity family=gpt2 lora=true clip_norm=1.0 --json

Both have the same seed, batches and optimizer, without dropout. The split model uses the whole
stack: client model, remote layer, codec, link, session, engine, parameter versions. The last line
has the largest difference of any step's loss and of any final weight; both are exactly 0.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig

from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.console import ending_with_its_reader, quiet_libraries
from fedsplit.data import Batch
from fedsplit.errors import ConfigError, FedsplitError
from fedsplit.link import Link, LocalLink
from fedsplit.model import SplitModel, connect, initial_parts, join_model
from fedsplit.model.lora import add_adapters, save_adapter, trainable
from fedsplit.optimization import PartOptimizer, clip_coefficient
from fedsplit.spec import DataSpec, LoraSpec, RunSpec, SplitSpec, TrainSpec
from fedsplit.transport.client import GrpcLink
from fedsplit.transport.server import GrpcServer
from fedsplit.trunk.service import TrunkService
from simulations.tiny import tiny_config

_READERS: dict[type, Callable[[str], object]] = {bool: {"true": True, "false": False}.__getitem__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """The settings of a comparison; each field is a `name=value` on the command line."""

    family: str = "gpt2"
    steps: int = 20
    link: str = "local"
    seed: int = 0
    lora: bool = False
    tied: str = "default"
    batch_size: int = 2
    tokens: int = 16
    accumulation: int = 1
    clip_norm: float = 0.0
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        if self.link not in ("local", "grpc"):
            raise ConfigError(f"link={self.link} is not one of: local, grpc")
        if self.tied not in ("default", "true", "false"):
            raise ConfigError(f"tied={self.tied} is not one of: default, true, false")
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps} is too small; it must be at least 1")

    @staticmethod
    def parse(words: list[str]) -> "Parity":
        """Read `name=value` words.

        Raises:
            ConfigError: A name or value is not allowed.
        """
        kinds = {field.name: type(getattr(Parity(), field.name)) for field in fields(Parity)}
        values: dict[str, Any] = {}
        for word in words:
            name, _, text = word.partition("=")
            if name not in kinds:
                raise ConfigError(f"{name!r} is not one of: {', '.join(kinds)}")
            try:
                values[name] = _READERS.get(kinds[name], kinds[name])(text)
            except (ValueError, KeyError) as exc:
                raise ConfigError(f"{word}: {text!r} is not {kinds[name].__name__}") from exc
        return Parity(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The outcome: largest absolute differences over all steps and all weights."""

    family: str
    steps: int
    link: str
    max_loss_diff: float
    max_weight_diff: float

    @property
    def line(self) -> str:
        """The last line of the program's output."""
        text = " ".join(f"{name}={value}" for name, value in asdict(self).items())
        return f"parity: {text.removeprefix('family=')}"


def compare(asked: Parity, remote: type[RemoteTrunk] = RemoteTrunk) -> Difference:
    """Train both models, and return their differences.

    Args:
        asked: The settings.
        remote: The class that calls the trunk for the client's model.
    """
    run = _run(asked)
    config = _config(asked)
    parts = initial_parts(config, run.split, run.seed)
    whole: nn.Module = join_model(parts.client, parts.trunk)
    if asked.lora:
        for part in (parts.client, parts.trunk):
            add_adapters(part, run.lora, run.seed)
        whole = _with_same_adapters(whole, parts)
    # A list, because both models train on the same batches.
    groups = list(_groups(asked, config))
    unsplit = _train_unsplit(whole, run, groups)
    with TrunkService(parts.trunk, run) as service, _link(asked, service, run) as link:
        trunk = remote(link, parts.client, run, client="alice")
        connect(parts.client, trunk)
        trainer = ClientTrainer(parts.client, trunk, run)
        with trunk.session():
            split = [trainer.step(group).loss for group in groups]
    weights = _by_plain_name(trainable(whole))
    trained = {**trainable(parts.client), **trainable(parts.trunk)}
    if trained.keys() != weights.keys():
        raise AssertionError(f"the two train different weights: {trained.keys() ^ weights.keys()}")
    return Difference(
        family=asked.family,
        steps=asked.steps,
        link=asked.link,
        max_loss_diff=max(abs(a - b) for a, b in zip(unsplit, split, strict=True)),
        max_weight_diff=max((weights[k] - w).abs().max().item() for k, w in trained.items()),
    )


def _run(asked: Parity) -> RunSpec:
    return RunSpec(
        seed=asked.seed,
        clients=1,
        split=SplitSpec.parse("1/*/1"),
        lora=LoraSpec(enabled=asked.lora, rank=4, alpha=8),
        data=DataSpec(sequence_length=asked.tokens),
        train=TrainSpec(
            rounds=1,
            local_steps=asked.steps,
            batch_size=asked.batch_size,
            accumulation=asked.accumulation,
            optimizer=asked.optimizer,
            weight_decay=0.01,
            clip_norm=asked.clip_norm,
            warmup_steps=2,
        ),
    )


def _config(asked: Parity) -> PretrainedConfig:
    config = tiny_config(asked.family, num_hidden_layers=4)
    # The two draw dropout masks from different seeds, so only without dropout are they comparable.
    without_dropout = {k: 0.0 for k, v in vars(config).items() if "drop" in k and v}
    for name, value in without_dropout.items():
        setattr(config, name, value)
    if asked.tied != "default":
        config.tie_word_embeddings = asked.tied == "true"
    return config


def _with_same_adapters(whole: nn.Module, parts: SplitModel) -> PeftModel:
    # The parts' adapters have random weights; the unsplit model must begin with the same.
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(parts.client, parts.trunk, folder)
        adapted: PeftModel = PeftModel.from_pretrained(whole, folder, is_trainable=True)
        return adapted


def _by_plain_name(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name.removeprefix("base_model.model."): p for name, p in parameters.items()}


def _groups(asked: Parity, config: PretrainedConfig) -> Iterator[list[Batch]]:
    chance = torch.Generator().manual_seed(asked.seed)
    for _ in range(asked.steps):
        yield [_batch(asked, config, chance) for _ in range(asked.accumulation)]


def _batch(asked: Parity, config: PretrainedConfig, chance: torch.Generator) -> Batch:
    """Return random tokens; a quarter of the last sequence is padding, at its right."""
    shape = (asked.batch_size, asked.tokens)
    ids_BT = torch.randint(3, config.vocab_size, shape, generator=chance)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[-1, -(asked.tokens // 4) :] = 0
    labels_BT = ids_BT.masked_fill(mask_BT == 0, -100)
    num_tokens = int((labels_BT[:, 1:] != -100).sum())
    return Batch(
        inputs={"input_ids": ids_BT, "attention_mask": mask_BT},
        labels=labels_BT,
        num_tokens=num_tokens,
        num_bytes=num_tokens,
    )


def _train_unsplit(model: nn.Module, run: RunSpec, groups: list[list[Batch]]) -> list[float]:
    """Train in an ordinary PyTorch loop, and return the loss of each step."""
    optimizer = PartOptimizer(trainable(model), run.train)
    model.train()
    losses = []
    for step, group in enumerate(groups):
        num_tokens = sum(batch.num_tokens for batch in group)
        total = 0.0
        for batch in group:
            mean = model(
                **batch.inputs,
                labels=batch.labels,
                use_cache=False,
            ).loss
            # The mean over all tokens of the group, not the mean of the batches' means.
            loss = mean * (batch.num_tokens / num_tokens)
            loss.backward()
            total += loss.item()
        optimizer.step(step, clip_coefficient(optimizer.sq_norm(), run.train.clip_norm))
        losses.append(total)
    return losses


@contextmanager
def _link(asked: Parity, service: TrunkService, run: RunSpec) -> Iterator[Link]:
    token = service.admit("alice")
    if asked.link == "local":
        yield LocalLink(service, token)
        return
    server = GrpcServer(service, wire=run.wire, limits=service.limits, max_clients=2)
    address = server.start()
    try:
        with closing(GrpcLink(address, token=token, wire=run.wire)) as link:
            yield link
    finally:
        server.stop()


@ending_with_its_reader()
def main() -> int:
    """Run the comparison; return 0 if the differences are exactly 0, else 1, and 2 for an error."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.parity", description=(__doc__ or "").split("\n\n")[0]
    )
    names = ", ".join(f"{f.name}={getattr(Parity(), f.name)}" for f in fields(Parity))
    parser.add_argument("settings", nargs="*", metavar="name=value", help=f"any of {names}")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the line"
    )
    arguments = parser.parse_args()
    quiet_libraries()
    try:
        difference = compare(Parity.parse(arguments.settings))
    except FedsplitError as error:
        print(f"parity: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(difference)) if arguments.json else difference.line)
    return 0 if difference.max_loss_diff == difference.max_weight_diff == 0.0 else 1


if __name__ == "__main__":
    sys.exit(main())
