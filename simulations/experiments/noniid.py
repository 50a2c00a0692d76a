"""The table of `noniid`: methods and policies against FedAvg, at clients whose data differs.

Each row is compared with `baseline=fedavg` on the same sharding, at equal tokens. A ratio above one
means that the loss of split learning is higher. The table says so if the difference exceeds the
spread over seeds.
"""

import math
from collections.abc import Sequence

from fedsplit.runs.compare import COLUMNS, Group, Row, Table, rows_of

_COLUMNS = {**COLUMNS, "against fedavg": lambda row: _verdict(row)}


def table(groups: Sequence[Group]) -> Table:
    """Return the comparison with each sharding's FedAvg; the figures are of SplitFed V2 in sync."""
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
    # A difference within the spread over seeds is no difference.
    word = "equal" if abs(difference) <= spread else "loses" if difference > 0 else "wins"
    return f"{ratio - 1:+.1%} {word}"
