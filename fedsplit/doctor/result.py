"""The result of a check."""

from dataclasses import dataclass
from enum import StrEnum

from fedsplit.errors import one_line


class State(StrEnum):
    """How a check ended: `WARN` may be meant so, and what `SKIPPED` needs was not given."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a check found.

    Attributes:
        name: The check's name.
        state: How it ended.
        what: What was found.
        do: What to do about it; empty if nothing is wrong.
    """

    name: str
    state: State
    what: str
    do: str = ""


def ok(name: str, what: str) -> Result:
    """Return the result of a check that found nothing wrong."""
    return Result(name=name, state=State.OK, what=what)


def warn(name: str, what: str, do: str) -> Result:
    """Return the result of a check that found something that may be wrong."""
    return Result(name=name, state=State.WARN, what=what, do=do)


def fail(name: str, what: str, do: str) -> Result:
    """Return the result of a check that found something wrong."""
    # Other libraries write their reasons in several lines.
    return Result(name=name, state=State.FAIL, what=one_line(what), do=do)


def skipped(name: str, what: str) -> Result:
    """Return the result of a check that was not made, and why."""
    return Result(name=name, state=State.SKIPPED, what=what)
