"""Checks that every spec shares; each names the field, its value and what is allowed."""

import math
from collections.abc import Collection

from fedsplit.errors import ConfigError


def one_of(name: str, value: str, allowed: Collection[str], later: Collection[str] = ()) -> None:
    """Refuse a word that is not allowed; one that is planned is refused as such."""
    if value in later:
        raise ConfigError(f"{name}={value} is not available yet; allowed: {', '.join(allowed)}")
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of: {', '.join(allowed)}")


def at_least(name: str, value: float, low: float) -> None:
    """Refuse a number below `low`, or none at all."""
    if not (math.isfinite(value) and value >= low):
        raise ConfigError(f"{name}={value} is too small; it must be at least {low}")


def positive(name: str, value: float) -> None:
    """Refuse a number that is not above zero."""
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name}={value} must be greater than 0")


def within(name: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside of [low, high)."""
    if not low <= value < high:
        raise ConfigError(f"{name}={value} is out of range; it must be in [{low}, {high})")
