"""One case of the fuzzer: its random numbers, its log, and the errors that it ended in."""

import random
from collections import Counter
from typing import Any

from fedsplit.errors import FedsplitError


class Wrong(Exception):
    """A result that is neither right nor a coded error."""


class Case:
    """A case, which its seed and number decide, or the part of it that one thread runs.

    Attributes:
        rng: The source of all its choices.
        log: What it sent and got, in order; text is made of it only if it is printed.
        ends: How often each code of an error came, and `ok` for each result.
    """

    def __init__(self, seed: int, number: int, part: str = "") -> None:
        self.seed, self.number = seed, number
        self.rng = random.Random(f"{seed}/{number}{part}")
        self.log: list[tuple[str, Any]] = []
        self.ends: Counter[str] = Counter()

    def sent(self, what: Any) -> None:
        """Add something that was sent to the log."""
        self.log.append(("sent", _kept(what)))

    def got(self, what: Any) -> None:
        """Add a result or a coded error to the log, and count it."""
        self.log.append(("got", _kept(what)))
        self.ends[what.code if isinstance(what, FedsplitError) else "ok"] += 1

    def part(self, name: str) -> "Case":
        """Return a part, which another thread may run."""
        return Case(self.seed, self.number, f"/{name}")

    def take(self, part: "Case") -> None:
        """Add the log and the ends of a part that has run."""
        self.log += part.log
        self.ends.update(part.ends)

    def __str__(self) -> str:
        lines = [f"case {self.number} of seed {self.seed}"]
        return "\n".join([*lines, *(f"  {way} {_short(what)}" for way, what in self.log)])


def _kept(what: Any) -> Any:
    # An error as text: its traceback would keep the case's models alive.
    return f"{what.code}: {what}" if isinstance(what, FedsplitError) else what


def _short(what: Any) -> str:
    text = repr(what)
    return text if len(text) <= 2000 else f"{text[:2000]} ... ({len(text)} characters)"
