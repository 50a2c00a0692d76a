"""Who copes with clients that differ? Methods and policies against FedAvg of the whole model.

Each row is compared with `baseline=fedavg` on the same sharding, at equal tokens. A ratio above
one means that split learning loses there; the table says so where it is more than the spread.
"""

import math
from collections.abc import Sequence

from fedsplit.runs.compare import COLUMNS, Group, Row, Table, rows_of

_COLUMNS = {**COLUMNS, "against fedavg": lambda row: _verdict(row)}


def table(groups: Sequence[Group]) -> Table:
    """The comparison with each sharding's FedAvg, and the ratio of SplitFed V2 in sync to it."""
    rows = rows_of(groups)
    fedavg = {_sharding(row): row for row in rows if row["settings"].get("baseline") == "fedavg"}
    figures = {}
    for row in rows:
        other = fedavg.get(_sharding(row))
        row["ratio_to_fedavg"] = row["loss"] / other["loss"] if other else math.nan
        row["fedavg_spread"] = other["loss_spread"] if other else math.nan
        if other and row["name"].startswith("v2-sync"):
            figures[f"loss_ratio_to_fedavg_{_sharding(row)}"] = row["ratio_to_fedavg"]
    return Table(rows=rows, columns=_COLUMNS, figures=figures)


def _sharding(row: Row) -> str:
    return str(row["settings"].get("sharding.kind", ""))


def _verdict(row: Row) -> str:
    ratio = row["ratio_to_fedavg"]
    if not math.isfinite(ratio) or row["settings"].get("baseline") == "fedavg":
        return ""
    spread = max(filter(math.isfinite, (row["loss_spread"], row["fedavg_spread"])), default=0.0)
    difference = row["loss"] * (1 - 1 / ratio)
    word = "equal" if abs(difference) <= spread else "loses" if difference > 0 else "wins"
    return f"{ratio - 1:+.1%} {word}"
