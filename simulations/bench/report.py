"""The report of a benchmark: figures by name, and the rows of raw measurements behind them.

Variants are measured in turns, each once per turn, so that a change in the machine's speed affects
all of them. A ratio is the median of the turns' ratios.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from fedsplit.console import table_text

Figure = float | bool


@dataclass(slots=True)
class Report:
    """The figures, rows and PNG pictures of a benchmark; each row is printed when it is added."""

    figures: dict[str, Figure] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)

    def row(self, of: str, **values: Any) -> None:
        """Add a measurement of the quantity `of`."""
        self.rows.append({"of": of, **values})
        print(f"{of}:", *(f"{name}={_short(value)}" for name, value in values.items()), flush=True)

    def spread(self, of: str, values: list[float], **which: Any) -> float:
        """Add a row with the values of all turns, their range and median; return the median."""
        middle = median(values)
        self.row(of, **which, median=middle, least=min(values), most=max(values), turns=values)
        return middle

    def ratio(self, of: str, over: list[float], under: list[float], **which: Any) -> float:
        """Add a row with the ratio of each turn, `over` / `under`; return the median."""
        return self.spread(of, [a / b for a, b in zip(over, under, strict=True)], **which)

    def take(self, other: "Report") -> None:
        """Add the figures, rows and pictures of another report."""
        self.figures |= other.figures
        self.rows += other.rows
        self.pictures |= other.pictures

    def as_json(self) -> dict[str, Any]:
        """Return the object that is written to a file."""
        return {"figures": self.figures, "rows": self.rows}

    def __str__(self) -> str:
        return "\n" + table_text([(name, _short(value)) for name, value in self.figures.items()])


def in_turns(
    turns: int, measures: Mapping[str, Callable[[], float]], *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Return the values of each measure, one for each turn.

    With `warm_up`, a turn before the first one is left out.
    """
    values = [
        {name: measure() for name, measure in measures.items()} for _ in range(turns + warm_up)
    ]
    return {name: [turn[name] for turn in values[warm_up:]] for name in measures}


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{' '.join(map(_short, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
