"""The trend of a quantity: its slope over time, and whether that is zero within its margin."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from fedsplit.errors import ConfigError

BLOCKS = 20
"""The means of so many blocks of equal time are fitted, so that short waves average out."""

_LEVEL = 0.95
_FEWEST_BLOCKS = 4
_FEWEST_EFFECTIVE = 6.0
"""The least effective number of blocks that a margin is computed with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """The slope of a quantity per hour; the confidence interval is `slope` plus-minus `margin`."""

    slope: float
    margin: float

    @property
    def is_zero(self) -> bool:
        """Whether zero is within the confidence interval."""
        return abs(self.slope) <= self.margin


def suffices(seconds: Sequence[float]) -> bool:
    """Whether values at these times have a trend: whether they are in enough blocks."""
    t, _ = _blocks(np.asarray(seconds, dtype=float), np.zeros(len(seconds)))
    return len(t) >= _FEWEST_BLOCKS


def trend_of(seconds: Sequence[float], values: Sequence[float], *, of: int = 1) -> Trend:
    """Fit a line to the last two thirds of a series, by least squares over the means of blocks.

    The margin allows for the correlation of neighboring blocks by a smaller effective number of
    them (Santer et al. 2000, "Statistical significance of trends", JGR 105(D6), equations 3 to 6).

    Args:
        seconds: The times of the values, in order.
        values: The values.
        of: The number of trends whose intervals together hold with 95 % confidence (Bonferroni).

    Raises:
        ConfigError: There are too few values.
    """
    t, y = _blocks(np.asarray(seconds, dtype=float), np.asarray(values, dtype=float))
    if len(t) < _FEWEST_BLOCKS:
        raise ConfigError(
            f"{len(values)} values are in {len(t)} blocks, and a trend needs values in "
            f"{_FEWEST_BLOCKS} of {BLOCKS}; run for a longer time"
        )
    t, y = t - t.mean(), y - y.mean()
    slope = float(t @ y / (t @ t))
    rest = y - slope * t
    squares = float(rest @ rest)
    correlation = max(0.0, float(rest[1:] @ rest[:-1]) / squares) if squares else 0.0
    effective = max(_FEWEST_EFFECTIVE, len(t) * (1.0 - correlation) / (1.0 + correlation))
    error = math.sqrt(squares / (effective - 2.0) / float(t @ t))
    return Trend(slope=slope, margin=error * _quantile(effective - 2.0, of))


def _blocks(
    t: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean times, in hours, and the mean values of those blocks that have any."""
    if not len(t):
        return t, y
    late = t >= t[0] + (t[-1] - t[0]) / 3.0
    # From the first value, so that a constant has a slope of exactly zero.
    hours, y = t[late] / 3600.0, y[late] - y[late][0]
    edges = np.linspace(hours[0], hours[-1], BLOCKS + 1)[1:-1]
    block = np.searchsorted(edges, hours, side="right")
    each = [block == number for number in range(BLOCKS) if (block == number).any()]
    return np.array([hours[i].mean() for i in each]), np.array([y[i].mean() for i in each])


def _quantile(freedom: float, of: int) -> float:
    """Return the two-sided quantile of Student's t (Abramowitz and Stegun 1964, 26.7.5)."""
    z = NormalDist().inv_cdf(1.0 - (1.0 - _LEVEL) / (2.0 * of))
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
