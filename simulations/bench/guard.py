"""The guard against clients that are out of proportion: false alarms, attacks, and its cost.

A vision transformer learns to classify digits without clipping, which would bound the attacks by
itself. For `clean_refusals`, each client has the images of one digit, and trains by SGD with ten
times the usual learning rate. For the losses, one more client attacks from the second round on;
they are those of the other clients, over those of a run without it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch

from fedsplit.config import compose
from fedsplit.spec import RunSpec
from fedsplit.trunk.norm_guard import NormGuard, Quarantine
from fedsplit.wire import messages as m
from simulations.bench.processes import threads_of_torch
from simulations.bench.report import Report
from simulations.bench.rounds import Attack, rounds_of

ATTACKS = tuple("nan 1e38 x1e6 weight1e15 step_end many_backwards label_flip_x50".split())
COMBINATIONS = ("mean", "median", "trimmed")
"""The values of policy.combine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The numbers of seeds, clients, rounds and steps in a round.

    `clean` are the rounds without an attacker, `backwards` those of an attacker's step, and
    `attacks` and `combinations` what is measured.
    """

    seeds: int
    clients: int
    clean: int
    rounds: int
    steps: int
    backwards: int
    attacks: tuple[str, ...]
    combinations: tuple[str, ...]


SIZES = {
    "full": Size(
        seeds=5,
        clients=10,
        clean=10,
        rounds=5,
        steps=20,
        backwards=100,
        attacks=ATTACKS,
        combinations=COMBINATIONS,
    ),
    # The guard begins after the twenty-one steps of the first round.
    "toy": Size(
        seeds=1,
        clients=4,
        clean=1,
        rounds=2,
        steps=7,
        backwards=3,
        attacks=("x1e6", "weight1e15"),
        combinations=("median",),
    ),
}
_TINY = (
    "model.config.num_hidden_layers=3 model.config.hidden_size=16 "
    "model.config.num_attention_heads=2 model.config.intermediate_size=32"
)
_RUN = (
    "experiment=images train.clip_norm=0 train.batch_size=8 train.lr=0.01 train.warmup_steps=10 "
    f"{_TINY}"
)
_ONE_CLASS = "sharding=pathological sharding.classes=1 train.optimizer=sgd train.lr=1.0"
_TIMED = 2000
"""Contributions that the guard judges to measure its time."""
_CLASSES = 10


def _scaled(factor: float) -> Any:
    def tamper(request: Any, run: RunSpec) -> Any:
        if not isinstance(request, m.BackwardRequest):
            return request
        return replace(request, grad_trunk_out_BTD=factor * request.grad_trunk_out_BTD)

    return tamper


def _filled(value: float) -> Any:
    def tamper(request: Any, run: RunSpec) -> Any:
        if not isinstance(request, m.BackwardRequest):
            return request
        filled = torch.full_like(request.grad_trunk_out_BTD, value)
        return replace(request, grad_trunk_out_BTD=filled)

    return tamper


def _at_the_end(request: Any, run: RunSpec) -> Any:
    if not isinstance(request, m.StepRequest):
        return request
    return replace(request, step=run.train.total_steps)


def _attacks(size: Size) -> Mapping[str, Attack]:
    return {
        "nan": Attack(tamper=_filled(math.nan)),
        "1e38": Attack(tamper=_filled(1e38)),
        "x1e6": Attack(tamper=_scaled(1e6)),
        "weight1e15": Attack(weight=10**15),
        "step_end": Attack(tamper=_at_the_end),
        "many_backwards": Attack(repeats=size.backwards),
        "label_flip_x50": Attack(tamper=_scaled(50.0), flips=True),
    }


def measure(size: str) -> Report:
    """Fill a report with the figures of the guard; `size` is `full` or `toy`."""
    report, what = Report(), SIZES[size]
    with threads_of_torch(1):
        _clean(report, what)
        alone = _loss(report, what, "none", None)
        attacks = _attacks(what)
        for name in what.attacks:
            found = _loss(report, what, name, attacks[name])
            report.figures[f"loss_others_{name}"] = found / alone
        _combinations(report, what, alone)
    return report


def _run(what: Size, clients: int, rounds: int, *overrides: str) -> RunSpec:
    sizes = f"clients={clients} train.rounds={rounds} train.local_steps={what.steps}"
    return compose([*_RUN.split(), *sizes.split(), *overrides])


# --- without an attacker --------------------------------------------------------------------------


def _clean(report: Report, what: Size) -> None:
    """Count the refusals of honest clients, and measure the guard's share of a step."""
    refused = clipped = taken = 0
    seconds = 0.0
    for seed in range(what.seeds):
        run = _run(what, _CLASSES, what.clean, *_ONE_CLASS.split(), f"seed={seed}")
        with rounds_of(run) as rounds:
            began = perf_counter()
            for number in range(1, what.clean + 1):
                rounds.take(number, rounds.members)
            seconds += perf_counter() - began
            records = rounds.service.engine.training.quarantine.records.values()
            refused += sum(record.refused for record in records) + len(rounds.failures)
            clipped += sum(record.clipped for record in records)
            taken += sum(member.trainer.steps for member in rounds.members)
    report.row("clean", steps=taken, refused=refused, clipped=clipped)
    report.figures["clean_steps"] = taken
    report.figures["clean_refusals"] = refused
    report.figures["clean_clipped"] = clipped
    report.figures["overhead"] = 1.0 + _seconds_of_guard() / (seconds / taken)


def _seconds_of_guard() -> float:
    """Return the seconds that the guard takes for a contribution; its norm is known anyway."""
    spec = RunSpec().guard
    guard, quarantine = NormGuard(spec, clients=10, memory=100), Quarantine(spec)
    began = perf_counter()
    for number in range(_TIMED):
        client = f"client-{number % _CLASSES}"
        quarantine.require_free(client, 0.0)
        quarantine.bounds_of(client, guard.bounds_of(client))
        guard.add(client, 1.0)
        quarantine.accept(client, clipped=False)
    return (perf_counter() - began) / _TIMED


# --- with an attacker ---------------------------------------------------------------------------


def _loss(report: Report, what: Size, name: str, attack: Attack | None, *overrides: str) -> float:
    """Train the same clients with an attacker or without; return their loss."""
    # The attacker has a partition of its own, so the others' data do not depend on it.
    run = _run(what, what.clients, what.rounds, *overrides)
    with rounds_of(run, attack or Attack()) as rounds:
        for number in range(1, what.rounds + 1):
            joined = rounds.attackers if attack and number > 1 else []
            rounds.take(number, [*rounds.members, *joined])
        loss = rounds.loss()
        records = rounds.service.engine.training.quarantine.records
        record = records.get(rounds.attackers[0].name)
    counts = (record.clipped, record.refused, record.quarantines) if record else (0, 0, 0)
    report.row("loss of the others", attack=name, settings=" ".join(overrides), loss=loss)
    report.row("guard", attack=name, clipped=counts[0], refused=counts[1], quarantines=counts[2])
    return loss


def _combinations(report: Report, what: Size, alone: float) -> None:
    """Measure what each combination costs, and the loss beside an attacker with factor nine."""
    steady = Attack(tamper=_scaled(9.0), flips=True)
    for combine in what.combinations:
        setting = f"policy.combine={combine}"
        clean = alone if combine == "mean" else _loss(report, what, "none", None, setting)
        attacked = _loss(report, what, "label_flip_x9", steady, setting)
        report.figures[f"loss_{combine}"] = clean / alone
        report.figures[f"loss_others_label_flip_x9_{combine}"] = attacked / clean
