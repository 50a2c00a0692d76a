"""A small federation in one process: real parts, a real service, local links."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.data import Batch
from fedsplit.link import Link, LocalLink
from fedsplit.model import ClientPart, SplitModel, connect, initial_parts, model_class_for
from fedsplit.spec import DataSpec, PolicySpec, RunSpec, SplitSpec, TrainSpec, WireSpec
from fedsplit.trunk.service import TrunkService
from fedsplit.trunk.update import TrunkUpdate
from strategies.mu_splitfed import UnbalancedUpdate
from strategies.splitfed_v1 import ReplicaUpdate


class Clock:
    """Seconds that pass only when a test changes `now`."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def wait_until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Wait until a condition holds that another thread brings about; fails after some seconds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come to hold"
        time.sleep(0.005)


def small_run(**changes: object) -> RunSpec:
    """Two sequences of twelve tokens a batch, plain SGD, no clipping."""
    train = TrainSpec(
        batch_size=2, optimizer="sgd", lr=0.1, schedule="constant", warmup_steps=0, clip_norm=0.0
    )
    base = RunSpec(
        train=train,
        split=SplitSpec.parse("1/*/1"),
        data=DataSpec(sequence_length=12),
        policy=PolicySpec(deadline_s=30.0),
        wire=WireSpec(budget_s=10.0),
    )
    return replace(base, **changes)


def joint_run(clients: int = 3, **train: Any) -> RunSpec:
    """Passes of so many clients, who wait long enough for one another."""
    run = small_run()
    train = {"clients_per_pass": clients, "max_queue_delay_s": 20.0, **train}
    return replace(run, train=replace(run.train, **train))


def batch(seed: int = 0, rows: int = 2, tokens: int = 12, pad: int = 0) -> Batch:
    """Random tokens below 60, other examples for each seed; the last row ends in `pad` padding."""
    ids_BT = torch.randint(1, 60, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[-1, tokens - pad :] = 0
    labels_BT = ids_BT.masked_fill(mask_BT == 0, -100)
    counted = int((labels_BT[:, 1:] != -100).sum())
    return Batch(
        inputs={"input_ids": ids_BT, "attention_mask": mask_BT},
        labels=labels_BT,
        num_tokens=counted,
        num_bytes=counted,
        examples_B=rows * seed + torch.arange(rows),
    )


@dataclass
class Member:
    """One client: its model, its session with the trunk, its trainer."""

    model: ClientPart
    trunk: RemoteTrunk
    trainer: ClientTrainer


@dataclass
class World:
    """A trunk that is served, and the clients that were added to it."""

    config: PretrainedConfig
    run: RunSpec
    parts: SplitModel
    service: TrunkService
    members: dict[str, Member] = field(default_factory=dict)

    def add(
        self, name: str, link: Link | None = None, encoder_state: Mapping[str, Tensor] | None = None
    ) -> Member:
        """A client with the initial weights, on a local link by default."""
        model = _initial_parts(self.config, self.run).client
        link = link or LocalLink(self.service, self.service.admit(name))
        trunk = RemoteTrunk(link, model, self.run, client=name, encoder_state=encoder_state or {})
        connect(model, trunk)
        member = Member(model=model, trunk=trunk, trainer=ClientTrainer(model, trunk, self.run))
        self.members[name] = member
        return member

    def trunk_weights(self) -> dict[str, Tensor]:
        """Copies of the trunk's parameters now."""
        return {k: p.detach().clone() for k, p in self.parts.trunk.named_parameters()}


@contextmanager
def world(
    config: PretrainedConfig,
    run: RunSpec | None = None,
    clock: Callable[[], float] = time.monotonic,
    *,
    replicas: bool = False,
    update: type[TrunkUpdate] | None = None,
) -> Iterator[World]:
    """Serve the trunk of a fresh model; by default with the update that the run needs."""
    run = run or small_run()
    parts = _initial_parts(config, run)
    update = update or update_for(run, replicas=replicas)
    with TrunkService(parts.trunk, run, clock, update=update) as service:
        yield World(config=config, run=run, parts=parts, service=service)


def fail(service: TrunkService) -> None:
    """Have a trunk's engine fail outside of any call, as in an optimizer step; waits for that."""

    def divide(*_: object) -> None:
        raise ZeroDivisionError("no memory for this step")

    service.engine.training.step_if_due = divide  # type: ignore[method-assign]
    service.engine.run(lambda: None)
    wait([service.engine.ended], timeout=30.0)


def update_for(run: RunSpec, *, replicas: bool = False) -> type[TrunkUpdate]:
    """Return the update of the method that a run, or a test of replicas, needs."""
    if replicas:
        return ReplicaUpdate
    return UnbalancedUpdate if run.train.trunk_steps > 1 else TrunkUpdate


def _initial_parts(config: PretrainedConfig, run: RunSpec) -> SplitModel:
    family = model_class_for(config, run.task)
    return initial_parts(config, run.split, run.seed, model_class=family)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal, bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
