"""Compression on the wire: bytes and final loss of each preset against none, over seeds.

Model and data of the default experiment, with one client and 120 steps; what differences from
the last epoch bring is seen over five epochs. Bytes are all that crossed between clients and trunk,
headers, scales and evaluation among them. docs/performance.md says what the figures mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory

from fedsplit.config import compose
from fedsplit.runs.compare import Group, Run
from simulations.bench.report import Report
from simulations.sweep import carried_out

_VARIANTS = {
    "none": [],
    "default": ["wire=lossy"],
    "strong": ["wire=strong"],
}
_EPOCHS = {
    "strong_epochs": ["wire=strong"],
    "history": ["wire=strong", "wire.history_bytes=100000000"],
}
"""What is compared over several epochs; the first is what the others are measured against."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Size:
    """What is trained, once and over epochs, and how often."""

    overrides: Sequence[str]
    epochs: Sequence[str]
    seeds: int


_SHORT = ["clients=1", "train.rounds=4", "train.local_steps=30", "train.evaluate_every=4"]
_LONG = ["clients=1", "train.rounds=5", "train.local_steps=112", "train.evaluate_every=5"]
_TOY = ["experiment=toy", "clients=1", "train.rounds=1", "data.held_out=0.02"]
_SIZES = {
    "full": _Size(overrides=_SHORT, epochs=_LONG, seeds=3),
    "toy": _Size(overrides=_TOY, epochs=_TOY, seeds=1),
}


def measure(size: str) -> Report:
    """Train every variant with every seed; `size` is `full` or `toy`."""
    report = Report()
    chosen = _SIZES[size]
    with TemporaryDirectory() as folder:
        for overrides, variants in ((chosen.overrides, _VARIANTS), (chosen.epochs, _EPOCHS)):
            base = [*overrides, f"launch.run_dir={folder}"]
            groups = {group.name: group for group in _trained(base, variants, chosen.seeds)}
            _compare(report, groups, against=next(iter(variants)))
    return report


def _compare(report: Report, groups: Mapping[str, Group], *, against: str) -> None:
    """Report bytes and losses of each group against those of one of them."""
    plain = groups[against].runs
    for group in groups.values():
        losses, mib = _losses(group.runs), _bytes(group.runs) / 2**20
        deltas = [loss / before - 1 for loss, before in zip(losses, _losses(plain), strict=True)]
        report.row(group.name, loss=losses, loss_deltas=deltas, mib=mib)
        if group.name != against:
            report.figures[f"bytes_ratio_{group.name}"] = _bytes(group.runs) / _bytes(plain)
            report.figures[f"loss_delta_{group.name}"] = sum(deltas) / len(deltas)


def _trained(base: Sequence[str], words_of: Mapping[str, Sequence[str]], seeds: int) -> list[Group]:
    variants = {
        name: [
            compose([*base, *words, f"name={name}-{seed}", f"seed={seed}"]) for seed in range(seeds)
        ]
        for name, words in words_of.items()
    }
    return carried_out(next(iter(variants.values()))[0], variants)


def _losses(runs: Sequence[Run]) -> list[float]:
    """Final held-out losses, in nats per token, by seed."""
    return [run.held_out("eval_loss")[-1] for run in runs]


def _bytes(runs: Sequence[Run]) -> float:
    return sum(run.total("bytes_up") + run.total("bytes_down") for run in runs)
