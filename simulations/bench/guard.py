"""The guard against clients that are out of proportion: false alarms, attacks, and its cost.

A vision transformer learns to classify digits without clipping, which would bound the attacks by
itself. For `clean_refusals`, each client has the images of one digit, and trains by SGD with ten
times the usual learning rate.

For `loss_others_<attack>`, one more client attacks from the second round on. The figure is the loss
of the other clients over that of a run without it: the mean of the ratios of some seeds. The
attackers of `CLAIMS` send honest gradients, and lie about their number or place. A guard can do no
better than take these gradients as an honest client's, and more data lower the loss of all. So
their figure is relative to a run in which that client is honest. `loss_honest` is the loss of the
others in that run over that of the run without it.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
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
CLAIMS = ("step_end", "many_backwards")
"""The attacks whose gradients are honest."""
COMBINATIONS = ("mean", "median", "trimmed")
"""The values of policy.combine; the first one is the reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The numbers of seeds, clients, rounds and steps in a round.

    `clean` are the rounds without an attacker, `attacked` the seeds of a run with one, `backwards`
    those of an attacker's step, `attacks` what is measured, and `combinations` the number of those.
    """

    seeds: int
    clients: int
    clean: int
    attacked: int
    rounds: int
    steps: int
    backwards: int
    attacks: tuple[str, ...]
    combinations: int


SIZES = {
    "full": Size(
        seeds=5,
        clients=8,
        clean=10,
        attacked=2,
        rounds=3,
        steps=20,
        backwards=100,
        attacks=ATTACKS,
        combinations=3,
    ),
    # The guard begins after the twenty-one steps of the first round.
    "toy": Size(
        seeds=1,
        clients=4,
        clean=1,
        attacked=1,
        rounds=2,
        steps=7,
        backwards=3,
        attacks=("x1e6", "weight1e15", "many_backwards"),
        combinations=2,
    ),
}
_TINY = (
    "model.config.num_hidden_layers=3 model.config.hidden_size=16 "
    "model.config.num_attention_heads=2 model.config.intermediate_size=32"
)
_RUN = (
    "experiment=images train.clip_norm=0 train.batch_size=8 train.lr=0.003 train.warmup_steps=10 "
    f"{_TINY}"
)
_ONE_CLASS = (
    "sharding=pathological sharding.classes=1 train.optimizer=sgd train.lr=1.0 "
    "train.clients_per_pass=10"
)
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
        for part in (_clean, _attacked, _combinations):
            began = perf_counter()
            part(report, what)
            report.row("seconds", part=part.__name__.strip("_"), seconds=perf_counter() - began)
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
    guard = NormGuard(spec, clients=_CLASSES, memory=100)
    quarantine = Quarantine(spec, most_clients=_CLASSES)
    began = perf_counter()
    for number in range(_TIMED):
        client = f"client-{number % _CLASSES}"
        quarantine.require_free(client, 0.0)
        quarantine.bounds_of(client, guard.bounds_of(client))
        guard.add(client, 1.0)
        quarantine.accept(client, clipped=False)
    return (perf_counter() - began) / _TIMED


# --- with an attacker ---------------------------------------------------------------------------


def _attacked(report: Report, what: Size) -> None:
    """Measure the loss of the others under each attack, and beside an honest client."""
    attacks, ratios = _attacks(what), defaultdict(list)
    for seed in range(what.attacked):
        loss = partial(_loss, report, what, f"seed={seed}")
        alone, honest = loss("none", None), loss("honest", Attack())
        ratios["loss_honest"].append(honest / alone)
        for name in what.attacks:
            reference = honest if name in CLAIMS else alone
            ratios[f"loss_others_{name}"].append(loss(name, attacks[name]) / reference)
    report.figures |= {name: fmean(of_seeds) for name, of_seeds in ratios.items()}


def _loss(report: Report, what: Size, setting: str, name: str, attack: Attack | None) -> float:
    """Train the same clients with an attacker or without; return their loss."""
    # The attacker has a partition of its own, so the others' data do not depend on it.
    run = _run(what, what.clients, what.rounds, setting)
    with rounds_of(run, attack or Attack()) as rounds:
        for number in range(1, what.rounds + 1):
            joined = rounds.attackers if attack and number > 1 else []
            rounds.take(number, [*rounds.members, *joined])
        loss = rounds.loss()
        records = rounds.service.engine.training.quarantine.records
        record = records.get(rounds.attackers[0].name)
    counts = (record.clipped, record.refused, record.quarantines) if record else (0, 0, 0)
    guarded = dict(zip(("clipped", "refused", "quarantines"), counts, strict=True))
    report.row("loss of the others", attack=name, setting=setting, loss=loss, **guarded)
    return loss


def _combinations(report: Report, what: Size) -> None:
    """Measure what each combination costs, and the loss beside an attacker with factor nine."""
    steady = Attack(tamper=_scaled(9.0), flips=True)
    mean = 0.0
    for combine in COMBINATIONS[: what.combinations]:
        loss = partial(_loss, report, what, f"policy.combine={combine}")
        clean, attacked = loss("none", None), loss("label_flip_x9", steady)
        mean = mean or clean
        report.figures[f"loss_{combine}"] = clean / mean
        report.figures[f"loss_others_label_flip_x9_{combine}"] = attacked / clean
