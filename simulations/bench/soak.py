"""Training and generation under random faults for minutes, and whether anything grows meanwhile.

The seed of the faults is printed. `growing` counts the quantities of which zero is outside of the
confidence interval of the slope, per hour, over the last two thirds; the rows have the slopes. The
intervals of all quantities together hold with 95 % confidence. `violations` counts wrong tokens,
errors that reached a user, rounds whose numbers differ from those of an undisturbed run, and what
clients left behind at the server.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from simulations.bench.report import Report
from simulations.soak.picture import picture_of
from simulations.soak.run import soak

MINUTES = {"full": 30.0, "toy": 0.1}
_SHOWN = 20


def measure(size: str, minutes: float = 0.0) -> Report:
    """Fill a report with what a soak of so many minutes found, or of those that `size` sets."""
    report, seed = Report(), secrets.randbelow(1 << 30)
    report.row("faults", seed=seed)
    with _folder() as folder:
        found = soak(folder, 60.0 * (minutes or MINUTES[size]), seed=seed)
    report.row("faults", seed=seed, **found.faults)
    for text in found.violations[:_SHOWN]:
        report.row("violation", text=text)
    trends = found.samples.trends()
    for name, trend in trends.items():
        interval = [trend.slope - trend.margin, trend.slope + trend.margin]
        zero = trend.is_zero
        report.row(name, slope_per_hour=trend.slope, interval=interval, zero_within=zero)
    report.figures |= {
        "violations": float(len(found.violations)),
        "rounds": float(found.rounds),
        "rounds_compared": float(found.compared),
        "sessions": float(found.sessions),
        "faults": float(found.faults.total()),
        "growing": float(sum(not trend.is_zero for trend in trends.values())),
    }
    report.pictures["soak.png"] = picture_of(found.samples.series, trends)
    return report


@contextmanager
def _folder() -> Iterator[Path]:
    # Unlike a path below the working directory, it is short and always there.
    with TemporaryDirectory(prefix="fedsplit-soak-", ignore_cleanup_errors=True) as folder:
        yield Path(os.path.realpath(folder))
