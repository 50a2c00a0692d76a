"""Compression on the wire: bytes and final loss of each preset against none, over seeds.

Model and data are those of the default experiment, with one client and 120 steps. Differences from
the last epoch are measured over five epochs. Bytes are all bytes between clients and trunk, with
headers, scales and evaluation. docs/compression.md explains the figures.
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
_HUFFMAN = [
    "wire.up=huffman:0.6",
    "wire.down=huffman:0.2",
    "wire.grad_up=huffman:0.9",
    "wire.grad_down=huffman:0.9",
]
_EPOCHS = {
    "huffman_epochs": _HUFFMAN,
    "history": [*_HUFFMAN, "wire.history_bytes=100000000"],
}
"""The variants that train several epochs; the first is the reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Size:
    """The overrides of short runs and of runs over several epochs, and the number of seeds."""

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
    # An empty folder, so that no run of an earlier benchmark counts as finished.
    with TemporaryDirectory() as folder:
        for overrides, variants in ((chosen.overrides, _VARIANTS), (chosen.epochs, _EPOCHS)):
            base = [*overrides, f"launch.run_dir={folder}"]
            groups = {group.name: group for group in _trained(base, variants, chosen.seeds)}
            _compare(report, groups, against=next(iter(variants)))
    return report


def _compare(report: Report, groups: Mapping[str, Group], *, against: str) -> None:
    """Report the bytes and losses of each group against those of the group `against`."""
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
    """Return the final held-out losses by seed, in nats per token."""
    return [run.held_out("eval_loss")[-1] for run in runs]


def _bytes(runs: Sequence[Run]) -> float:
    return sum(run.total("bytes_up") + run.total("bytes_down") for run in runs)
