"""Compression on the wire: bytes and final loss of each preset against none, over seeds.

Model and data of the default experiment, with one client and 120 steps. Bytes are all that crossed
between clients and trunk, headers, scales and evaluation among them. docs/performance.md says
what the figures mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory

from fedsplit.compare import Group, Run
from fedsplit.config import compose
from simulations.bench.report import Report
from simulations.sweep import carried_out

_VARIANTS = {
    "none": [],
    "default": ["wire=lossy"],
    "strong": ["wire=strong"],
    "strong_feedback": ["wire=strong", "wire.feedback=true"],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Size:
    """What is trained, and how often."""

    overrides: Sequence[str]
    seeds: int


_SHORT = ["clients=1", "train.rounds=4", "train.local_steps=30", "train.evaluate_every=4"]
_SIZES = {
    "full": _Size(overrides=_SHORT, seeds=3),
    "toy": _Size(overrides=["experiment=toy", "clients=1", "train.rounds=1"], seeds=1),
}


def measure(size: str) -> Report:
    """Train every variant with every seed; `size` is `full` or `toy`."""
    report = Report()
    with TemporaryDirectory() as folder:
        groups = {group.name: group for group in _trained(_SIZES[size], folder)}
    plain = groups.pop("none").runs
    report.row("none", loss=_losses(plain), mib=_bytes(plain) / 2**20)
    for name, group in groups.items():
        losses = _losses(group.runs)
        deltas = [loss / before - 1 for loss, before in zip(losses, _losses(plain), strict=True)]
        report.figures[f"bytes_ratio_{name}"] = _bytes(group.runs) / _bytes(plain)
        report.figures[f"loss_delta_{name}"] = sum(deltas) / len(deltas)
        report.row(name, loss=losses, loss_deltas=deltas, mib=_bytes(group.runs) / 2**20)
    return report


def _trained(size: _Size, folder: str) -> list[Group]:
    base = [*size.overrides, f"launch.run_dir={folder}"]
    variants = {
        name: [
            compose([*base, *words, f"name={name}-{seed}", f"seed={seed}"])
            for seed in range(size.seeds)
        ]
        for name, words in _VARIANTS.items()
    }
    return carried_out(variants["none"][0], variants)


def _losses(runs: Sequence[Run]) -> list[float]:
    """Final held-out losses, in nats per token, by seed."""
    return [run.held_out("eval_loss")[-1] for run in runs]


def _bytes(runs: Sequence[Run]) -> float:
    return sum(run.total("bytes_up") + run.total("bytes_down") for run in runs)
