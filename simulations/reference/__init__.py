"""The pages of docs/reference/, made of the code that they describe."""

from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""Return a Markdown table.

    >>> print(table(["field", "values"], [["kv", "a | b"]]))
    | field | values |
    |---|---|
    | kv | a \| b |
    """
    lines = [heads, *rows]
    texts = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines]
    first, *rest = (f"| {text} |" for text in texts)
    return "\n".join([first, "|---" * len(heads) + "|", *rest])
