"""Checks that every spec shares; each names the field, its value and what is allowed."""

import math
from collections.abc import Collection

from fedsplit.errors import ConfigError

CODECS = {
    "none": (),
    "bf16": (),
    "fp16": (),
    "int8": ("stochastic",),
    "int4": ("stochastic",),
    "topk": ("FRACTION",),
    "randtopk": ("FRACTION",),
    "huffman": ("STEP",),
}
"""The codecs of the wire by name, with what may stand after a colon."""

MAX_SECONDS = 100_000_000
"""The longest time that a setting may name: three years."""

_NUMBERS = {
    "FRACTION": ("which fraction of the values is sent", 1.0, "0.1"),
    "STEP": ("how long a step is in root mean squares of a row", 4.0, "0.5"),
}
"""What must stand after a colon: what it is, its largest, and an example."""


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


def duration(name: str, value: float) -> None:
    """Refuse a time in seconds that is not above zero, or that no thread can wait for."""
    positive(name, value)
    if value > MAX_SECONDS:  # beyond, threads raise OverflowError and gRPC's deadlines wrap around
        raise ConfigError(f"{name}={value} is too large; it must be at most {MAX_SECONDS} seconds")


def within(name: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside of [low, high)."""
    if not low <= value < high:
        raise ConfigError(f"{name}={value} is out of range; it must be in [{low}, {high})")


def parsed_codec(field: str, text: str) -> tuple[str, str]:
    """Name and option of a codec of the wire, such as `int8:stochastic` or `topk:0.1`.

    Raises:
        ConfigError: There is no such codec.

    >>> parsed_codec("wire.up", "topk:0.1")
    ('topk', '0.1')
    """
    name, colon, option = text.partition(":")
    one_of(field, name, CODECS)
    if CODECS[name] and (needed := _NUMBERS.get(CODECS[name][0])):
        meaning, most, example = needed
        try:
            number = float(option)
        except ValueError:
            number = math.nan
        if not 0 < number <= most:
            raise ConfigError(
                f"{field}={text} must say {meaning}, above 0 and at most {most:g}, such as "
                f"{name}:{example}"
            )
    elif colon and option not in CODECS[name]:
        allowed = " or ".join([name, *(f"{name}:{each}" for each in CODECS[name])])
        raise ConfigError(f"{field}={text} has no such option; write {allowed}")
    return name, option
