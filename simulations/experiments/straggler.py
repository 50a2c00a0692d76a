"""The table of `straggler`: the cost of one slow client under each policy.

All times are virtual (`policy.sim_slowdown`). `time_ratio_async` and `time_ratio_quorum` are the
times in which these policies reach the final loss of `sync`, over the time of `sync`.
`others_speed` is the steps per second of the other clients in the slower of the two, over those of
a client in a run without a slow one (the variant `even`).
"""

import math
from collections.abc import Sequence
from statistics import fmean

from fedsplit.runs.compare import COLUMNS, Group, Run, Table, number, rows_of

_COLUMNS = {
    **COLUMNS,
    "to sync's loss": lambda row: number(row["seconds_to_sync_loss"], ".0f"),
    "others' steps/s": lambda row: number(row["others_steps_per_second"]),
}


def table(groups: Sequence[Group]) -> Table:
    """Return the comparison, with the time to sync's loss and the speed of the other clients."""
    rows = rows_of(groups)
    by_name = {group.name: group for group in groups}
    for row, group in zip(rows, groups, strict=True):
        row["seconds_to_sync_loss"] = _seconds_to_loss_of(by_name.get("sync"), group)
        row["others_steps_per_second"] = fmean(map(_others_speed, group.runs))
    row_of = {row["name"]: row for row in rows}
    figures = {
        f"time_ratio_{name}": row_of[name]["seconds_to_sync_loss"]
        / row_of["sync"]["virtual_seconds"]
        for name in ("async", "quorum")
        if {"sync", name} <= row_of.keys()
    }
    if {"async", "quorum", "even"} <= row_of.keys():
        speed = {name: row["others_steps_per_second"] for name, row in row_of.items()}
        figures["others_speed"] = min(speed["async"], speed["quorum"]) / speed["even"]
    return Table(rows=rows, columns=_COLUMNS, figures=figures)


def _seconds_to_loss_of(sync: Group | None, group: Group) -> float:
    """Return the mean over seeds of the virtual time to the final loss of sync."""
    if sync is None:
        return math.nan
    goals = {run.spec.seed: run.held_out("eval_loss")[-1] for run in sync.runs}
    return fmean(_seconds_to(run, goals.get(run.spec.seed, -math.inf)) for run in group.runs)


def _seconds_to(run: Run, goal: float) -> float:
    curve = run.curve("virtual seconds")
    return next((seconds for seconds, loss in curve if loss <= goal), math.nan)


def _others_speed(run: Run) -> float:
    """Return the steps per virtual second of a client that is not slow."""
    # In the last round all clients wait for the slow one, so it does not count.
    rounds = run.rounds[:-1] or run.rounds
    seconds = sum(stats.virtual_seconds for stats in rounds)
    factors = [factor for factor in run.spec.policy.sim_slowdown.values() if factor > 1]
    # A slow client takes at most one step in `factor` seconds.
    others = sum(stats.steps for stats in rounds) - sum(seconds / factor for factor in factors)
    return others / seconds / (run.spec.clients - len(factors)) if seconds else math.nan
