"""Does split training reach the loss of the unsplit model? At equal tokens, over several seeds.

`loss_ratio_to_central` is the final held-out loss of split training over that of the unsplit
model trained on the union of the clients' batches, step for step; `loss_ratio_to_sequence` over
that of one client that has all data and trains on as many tokens, batch after batch.
"""

from collections.abc import Sequence

from fedsplit.runs.compare import COLUMNS, Group, Table, rows_of


def table(groups: Sequence[Group]) -> Table:
    """The comparison, and the two ratios where their variants are there."""
    rows = rows_of(groups)
    loss = {row["name"]: row["loss"] for row in rows}
    figures = {
        f"loss_ratio_to_{other}": loss["split"] / loss[other]
        for other in ("central", "sequence")
        if {"split", other} <= loss.keys()
    }
    return Table(rows=rows, columns=COLUMNS, figures=figures)
