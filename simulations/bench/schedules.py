"""Thousands of schedules of faults in virtual time, on one core, and ten planted bugs.

`violations` is the number of schedules in which the checker found one, and `planted_found` that of
the bugs which it finds. The rows have what each fault happened to, and a failing schedule, shrunk,
in a form that `tests/oracle` can keep.
"""

import time

import torch

from simulations.bench.report import Report
from simulations.schedules.campaign import Findings, campaign
from simulations.schedules.planted import PLANTED

SIZES = {"full": 10_000, "toy": 100}
_SHOWN = 5


def measure(size: str, count: int = 0) -> Report:
    """Fill a report with the findings of `count` schedules, or of the number that `size` sets."""
    report, count = Report(), count or SIZES[size]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with campaign() as played:
            begin = time.monotonic(), time.process_time()
            findings = played.run(range(count))
            seconds = time.monotonic() - begin[0], time.process_time() - begin[1]
            found = played.planted_found()
            for schedule, violations in findings.violations[:_SHOWN]:
                smaller = played.shrunk(schedule)
                report.row("violation", seed=schedule.seed, text=violations[0], kept=str(smaller))
    finally:
        torch.set_num_threads(before)
    _add_coverage(report, findings)
    for name in PLANTED:
        report.row("planted", bug=name, found=name in found)
    report.figures |= {
        "schedules": float(findings.schedules),
        "violations": float(len(findings.violations)),
        "planted_found": float(len(found)),
        "seconds": seconds[0],
        "cpu_seconds": seconds[1],
    }
    return report


def _add_coverage(report: Report, findings: Findings) -> None:
    for fault in sorted({fault for fault, _ in findings.happened}):
        by_kind = {kind or "times": n for (f, kind), n in findings.happened.items() if f == fault}
        report.row("fault", fault=fault, **dict(sorted(by_kind.items())))
