"""Trains the unsplit and the split model on the same batches, and prints how much they differ.

    python -m simulations.parity family=llama steps=20 link=grpc
    python -m simulations.parity family=gpt2 lora=true clip_norm=1.0 --json
    python -m simulations.parity family=llama steps=20 trunk_servers=2 clients=2 --json FILE

Both have the same seed, batches and optimizer, without dropout. The split model uses the whole
stack: client model, remote layer, codec, link, session, engine, parameter versions. The last line
has the largest difference of any step's loss and of any final weight; both are exactly 0.

With several trunk servers, the reference is one server with all clients.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
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
from fedsplit.spec import DataSpec, LoraSpec, PolicySpec, RunSpec, SplitSpec, TrainSpec
from fedsplit.transport.client import GrpcLink
from fedsplit.transport.server import GrpcServer
from fedsplit.trunk.service import TrunkService
from simulations.several_servers import Trained, train
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
    clients: int = 1
    trunk_servers: int = 1
    policy: str = "sync"

    def __post_init__(self) -> None:
        if min(self.clients, self.trunk_servers) < 1:
            raise ConfigError(
                f"clients={self.clients} and trunk_servers={self.trunk_servers} must be at least 1"
            )
        if self.clients > 1 and self.trunk_servers == 1:
            raise ConfigError(
                f"clients={self.clients} are compared with one server that has all of them; set "
                "trunk_servers=2 or more, or clients=1"
            )
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
    groups = list(_groups(asked, config, asked.seed))
    unsplit = _train_unsplit(whole, run, groups)
    with (
        TrunkService(parts.trunk, run) as service,
        _link(asked, service, service.admit("alice"), run=run) as link,
    ):
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


def compare_servers(asked: Parity) -> Difference:
    """Train the same clients at one server and at several, and return the differences."""
    run, config = _run(asked), _config(asked)
    groups = [list(_groups(asked, config, seed)) for seed in range(asked.clients)]

    def trained(servers: int) -> Trained:
        copies = max(asked.clients, servers)
        parts = [_parts(config, run) for _ in range(copies)]
        at = replace(run, launch=replace(run.launch, trunk_servers=servers))
        return train(at, parts, groups, partial(_link, asked, run=run))

    one, several = trained(1), trained(asked.trunk_servers)
    pairs = [(one.losses[name], several.losses[name]) for name in one.losses]
    return Difference(
        family=asked.family,
        steps=asked.steps,
        link=asked.link,
        max_loss_diff=max(abs(a - b) for each in pairs for a, b in zip(*each, strict=True)),
        max_weight_diff=max(
            (several.weights[name] - weight).abs().max().item()
            for name, weight in one.weights.items()
        ),
    )


def _parts(config: PretrainedConfig, run: RunSpec) -> SplitModel:
    parts = initial_parts(config, run.split, run.seed)
    for part in (parts.client, parts.trunk):
        add_adapters(part, run.lora, run.seed)
    return parts


def _run(asked: Parity) -> RunSpec:
    return RunSpec(
        seed=asked.seed,
        clients=asked.clients,
        # A quorum of all, because with fewer the steps would depend on the machine's speed.
        policy=PolicySpec(kind=asked.policy, quorum=float(asked.clients)),
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


def _groups(asked: Parity, config: PretrainedConfig, seed: int) -> Iterator[list[Batch]]:
    chance = torch.Generator().manual_seed(seed)
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
def _link(asked: Parity, service: TrunkService, token: str, *, run: RunSpec) -> Iterator[Link]:
    if asked.link == "local":
        yield LocalLink(service, token)
        return
    server = GrpcServer(
        service,
        wire=run.wire,
        limits=service.limits,
        max_clients=2,
        payload_of=service.followers.payload_of,
    )
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
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write one JSON object there; without FILE, print it instead of the line",
    )
    arguments = parser.parse_args()
    quiet_libraries()
    try:
        asked = Parity.parse(arguments.settings)
        difference = compare(asked) if asked.trunk_servers == 1 else compare_servers(asked)
    except FedsplitError as error:
        print(f"parity: {error}", file=sys.stderr)
        return 2
    found = json.dumps(asdict(difference))
    print(found if arguments.json == "-" else difference.line)
    if arguments.json not in (None, "-"):
        Path(arguments.json).write_text(found + "\n", encoding="utf-8")
    return 0 if difference.max_loss_diff == difference.max_weight_diff == 0.0 else 1


if __name__ == "__main__":
    sys.exit(main())
