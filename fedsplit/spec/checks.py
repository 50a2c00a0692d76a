"""The checks of all specs; each error has the field, its value and the allowed values."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, get_type_hints

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
    "lowrank": ("STEP",),
}
"""The codecs of the wire by name, each with the options that it allows after a colon."""

MAX_INTEGER = (1 << 63) - 1
"""The largest whole number of a setting without a limit of its own: messages have 64 bits."""

MAX_SECONDS = 100_000_000
"""The longest time that a setting allows: three years."""

_NUMBERS = {
    "FRACTION": ("which fraction of the values is sent", 1.0, "0.1"),
    "STEP": ("how long a step is in root mean squares of a row", 4.0, "0.5"),
}
"""Numbers that are required after a colon: their meaning, the maximum, and an example."""


class Allowed(ABC):
    """The values that a field of a spec may have, as the metadata of its `Annotated` type."""

    @abstractmethod
    def check(self, name: str, value: Any) -> None:
        """Raise ConfigError if the field `name` has a value that is not allowed."""

    @abstractmethod
    def __str__(self) -> str:
        """Return the allowed values in words."""


class OneOf(Allowed):
    """One of some words.

    Args:
        allowed: The words.
        later: Words that are planned. Their error says that they are not available yet.
    """

    def __init__(self, *allowed: str, later: Collection[str] = ()) -> None:
        self._allowed = allowed
        self._later = later

    def check(self, name: str, value: str) -> None:
        """Raise ConfigError for a word that is not allowed."""
        if value in self._later:
            raise ConfigError(f"{name}={value} is not available yet; allowed: {self}")
        one_of(name, value, self._allowed)

    def __str__(self) -> str:
        return ", ".join(self._allowed)


@dataclass(frozen=True, slots=True)
class AtLeast(Allowed):
    """A finite number from `low` to `most`, both included."""

    low: float
    most: float = math.inf

    def check(self, name: str, value: float) -> None:
        """Raise ConfigError for a number outside of the range, for NaN and for infinity."""
        if not self.low <= value < math.inf:
            raise ConfigError(f"{name}={value} is too small; it must be at least {self.low}")
        _at_most(name, value, self.most)

    def __str__(self) -> str:
        return f"at least {self.low}" + _up_to(self.most)


@dataclass(frozen=True, slots=True)
class Positive(Allowed):
    """A finite number above 0 and at most `most`."""

    most: float = math.inf

    def check(self, name: str, value: float) -> None:
        """Raise ConfigError for a number outside of the range, for NaN and for infinity."""
        if not 0 < value < math.inf:
            raise ConfigError(f"{name}={value} must be greater than 0")
        _at_most(name, value, self.most)

    def __str__(self) -> str:
        return "greater than 0" + _up_to(self.most)


@dataclass(frozen=True, slots=True)
class Within(Allowed):
    """A number in [low, high)."""

    low: float
    high: float

    def check(self, name: str, value: float) -> None:
        """Raise ConfigError for a number outside of the range, and for NaN."""
        # NaN fails this comparison too.
        if not self.low <= value < self.high:
            raise ConfigError(
                f"{name}={value} is out of range; it must be in [{self.low}, {self.high})"
            )

    def __str__(self) -> str:
        return f"at least {self.low:g} and below {self.high:g}"


@dataclass(frozen=True, slots=True)
class Each(Allowed):
    """A mapping of which every value is allowed."""

    allowed: Allowed

    def check(self, name: str, value: Mapping[str, Any]) -> None:
        """Raise ConfigError for the first value that is not allowed, with its key."""
        for key, one in value.items():
            self.allowed.check(f"{name} of {key}", one)

    def __str__(self) -> str:
        return f"each {self.allowed}"


@dataclass(frozen=True, slots=True)
class Matching(Allowed):
    """Text that a pattern matches; `words` describes it."""

    pattern: re.Pattern[str]
    words: str

    def check(self, name: str, value: str) -> None:
        """Raise ConfigError for text that the pattern does not match."""
        if not self.pattern.fullmatch(value):
            raise ConfigError(f"{name}={value!r} must be {self.words}")

    def __str__(self) -> str:
        return self.words


class Codec(Allowed):
    """A codec of the wire, with its option; see `parsed_codec`."""

    def check(self, name: str, value: str) -> None:
        """Raise ConfigError for text that names no codec, or an option that it does not have."""
        parsed_codec(name, value)

    def __str__(self) -> str:
        forms = [
            _form(codec, option) for codec, options in CODECS.items() for option in options or [""]
        ]
        bounds = [
            f"{option} above 0 and at most {most:g}" for option, (_, most, _) in _NUMBERS.items()
        ]
        return "; ".join([", ".join(forms), *bounds])


def _form(codec: str, option: str) -> str:
    if option in _NUMBERS:
        return f"{codec}:{option}"
    return f"{codec}[:{option}]" if option else codec


# Longer waits raise OverflowError in threads, and gRPC's deadlines wrap around.
DURATION = Positive(most=MAX_SECONDS)
"""A time in seconds."""


def check_fields(spec: Any, group: str = "") -> None:
    """Raise ConfigError for the first field whose value its `Annotated` type does not allow.

    Args:
        spec: A dataclass.
        group: The group of a run that it is, for the error.
    """
    for name, allowed in _allowed(spec.__class__):
        allowed.check(f"{group}.{name}".lstrip("."), getattr(spec, name))


@cache
def _allowed(spec: type) -> tuple[tuple[str, Allowed], ...]:
    # Cached, since the types of a class are evaluated and every object is checked.
    types = get_type_hints(spec, include_extras=True).items()
    return tuple((name, each) for name, kind in types for each in getattr(kind, "__metadata__", ()))


def one_of(name: str, value: str, allowed: Collection[str]) -> None:
    """Raise ConfigError for a word that is not allowed."""
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of: {', '.join(allowed)}")


def _at_most(name: str, value: float, most: float) -> None:
    if isinstance(value, int) and not math.isfinite(most):
        most = MAX_INTEGER
    if value > most:
        raise ConfigError(f"{name}={value} is too large; it must be at most {most}")


def _up_to(most: float) -> str:
    return f" and at most {most}" if math.isfinite(most) else ""


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
