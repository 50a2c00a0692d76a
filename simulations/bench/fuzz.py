"""Hundreds of thousands of damaged messages, replies and configs, beside an honest client.

A process of its own runs the cases, because a fault of a native library would end it. The figures
are counts of what must not happen, and are 0; the rows say in which errors the cases ended.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from fedsplit.errors import Internal
from simulations.bench.processes import Answers, process
from simulations.bench.report import Report
from simulations.fuzzing.campaign import campaign

SIZES = {"full": 200_000, "toy": 300}
_SHOWN = 20


def measure(size: str, cases: int = 0) -> Report:
    """Fill a report with the findings of `cases` cases, or of the number that `size` sets."""
    report, cases = Report(), cases or SIZES[size]
    with process(fuzzer) as worker:
        try:
            found = worker.ask("run", cases)
        except Internal:  # the process has ended
            report.figures["crashes"] = 1.0
            return report
    for layer, ends in sorted(found["ends"].items()):
        report.row("layer", layer=layer, cases=found["cases"][layer], **ends)
    for of in ("foreign", "hangs"):
        for number, text in found[of][:_SHOWN]:
            report.row(of, case=number, text=text)
    report.figures |= {
        "cases": float(sum(found["cases"].values())),
        "crashes": float(found["crashes"]),
        "foreign_errors": float(len(found["foreign"])),
        "hangs": float(len(found["hangs"])),
        "honest_changed": float(found["honest_changed"]),
        "rss_growth_mib": found["rss_growth_mib"],
        "threads_max": float(found["threads_max"]),
    }
    return report


@contextmanager
def fuzzer() -> Iterator[Answers]:
    """Run cases in a process; `run` returns what they found."""

    def run(cases: int) -> dict[str, Any]:
        found = campaign(0, cases)
        # `asdict` would make counters of the counters' pairs.
        return {each.name: getattr(found, each.name) for each in fields(found)}

    yield {"run": run}
