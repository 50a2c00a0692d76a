"""What a bench found: figures by name, and the rows of raw measurements behind them.

What is compared is measured in turns, one of each and then again, so that a machine that gets
slower or faster meanwhile does so for all of them. A ratio is the median of the turns' ratios.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from fedsplit.console import table_text

Figure = float | bool


@dataclass(slots=True)
class Report:
    """Filled while a bench runs; a row is printed when it is there."""

    figures: dict[str, Figure] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def row(self, of: str, **values: Any) -> None:
        """Note a measurement; `of` says of what."""
        self.rows.append({"of": of, **values})
        print(f"{of}:", *(f"{name}={_short(value)}" for name, value in values.items()), flush=True)

    def spread(self, of: str, values: list[float], **which: Any) -> float:
        """Note what several turns said, and between what it lies; the median."""
        middle = median(values)
        self.row(of, **which, median=middle, least=min(values), most=max(values), turns=values)
        return middle

    def ratio(self, of: str, over: list[float], under: list[float], **which: Any) -> float:
        """Note how many times `under` the values of `over` are, turn by turn; the median."""
        return self.spread(of, [a / b for a, b in zip(over, under, strict=True)], **which)

    def take(self, other: "Report") -> None:
        """Add what another one found."""
        self.figures |= other.figures
        self.rows += other.rows

    def as_json(self) -> dict[str, Any]:
        """What is written to a file."""
        return {"figures": self.figures, "rows": self.rows}

    def __str__(self) -> str:
        return "\n" + table_text([(name, _short(value)) for name, value in self.figures.items()])


def in_turns(
    turns: int, measures: Mapping[str, Callable[[], float]], *, warm_up: bool = True
) -> dict[str, list[float]]:
    """What each measure says, once a turn; a turn before the first one warms up and is left out."""
    said = [{name: measure() for name, measure in measures.items()} for _ in range(turns + warm_up)]
    return {name: [turn[name] for turn in said[warm_up:]] for name in measures}


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{' '.join(map(_short, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
