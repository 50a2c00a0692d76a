"""The table of `convergence`: split training against the unsplit model, at equal tokens.

`loss_ratio_to_central` is the final held-out loss of split training over that of the unsplit model,
trained with the union of the clients' batches in each step. `loss_ratio_to_sequence` is that over
the loss of one client that has all data and trains on as many tokens, one batch after another.
`loss_ratio_to_no_trunk` is that over the loss of the clients' own blocks without any trunk; what is
missing to one is what the trunk was worth.
"""

from collections.abc import Sequence

from fedsplit.runs.compare import COLUMNS, Group, Table, rows_of


def table(groups: Sequence[Group]) -> Table:
    """Return the comparison, and each ratio whose variants have runs."""
    rows = rows_of(groups)
    loss = {row["name"]: row["loss"] for row in rows}
    figures = {
        f"loss_ratio_to_{other}": loss["split"] / loss[other]
        for other in ("central", "sequence", "no_trunk")
        if {"split", other} <= loss.keys()
    }
    return Table(rows=rows, columns=COLUMNS, figures=figures)
