"""Range checks of all specs; each error has the field, its value and the allowed values."""

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
"""The codecs of the wire by name, each with the options that it allows after a colon."""

MAX_SECONDS = 100_000_000
"""The longest time that a setting allows: three years."""

_NUMBERS = {
    "FRACTION": ("which fraction of the values is sent", 1.0, "0.1"),
    "STEP": ("how long a step is in root mean squares of a row", 4.0, "0.5"),
}
"""Numbers that are required after a colon: their meaning, the maximum, and an example."""


def one_of(name: str, value: str, allowed: Collection[str], later: Collection[str] = ()) -> None:
    """Raise ConfigError for a word that is not allowed; a planned one has a text of its own."""
    if value in later:
        raise ConfigError(f"{name}={value} is not available yet; allowed: {', '.join(allowed)}")
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of: {', '.join(allowed)}")


def at_least(name: str, value: float, low: float) -> None:
    """Raise ConfigError for a number below `low`, for NaN and for infinity."""
    if not (math.isfinite(value) and value >= low):
        raise ConfigError(f"{name}={value} is too small; it must be at least {low}")


def positive(name: str, value: float) -> None:
    """Raise ConfigError for a number that is not finite and above zero."""
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name}={value} must be greater than 0")


def duration(name: str, value: float) -> None:
    """Raise ConfigError for a time in seconds that is not in (0, `MAX_SECONDS`]."""
    positive(name, value)
    # Longer waits raise OverflowError in threads, and gRPC's deadlines wrap around.
    if value > MAX_SECONDS:
        raise ConfigError(f"{name}={value} is too large; it must be at most {MAX_SECONDS} seconds")


def within(name: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError for a number outside of [low, high)."""
    # NaN fails this comparison too.
    if not low <= value < high:
        raise ConfigError(f"{name}={value} is out of range; it must be in [{low}, {high})")


def parsed_codec(field: str, text: str) -> tuple[str, str]:
    """Return name and option of a codec of the wire, such as `int8:stochastic` or `topk:0.1`.

    Args:
        field: The setting, for the error.
        text: Its value.

    Raises:
        ConfigError: There is no such codec, or it does not allow this option.

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
            # NaN is outside of every range, so the check below reports it.
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
