"""The commands with which one goes on after a run."""

import shlex

from fedsplit.runs.folder import RunFolder
from fedsplit.spec import RunSpec


def next_commands(
    run: RunSpec, folder: RunFolder, *, is_over: bool = True
) -> list[tuple[str, str]]:
    """Return what one can do with a run and the command for it.

    Args:
        run: Its settings.
        folder: Its folder.
        is_over: Whether it has a result.
    """
    path = shlex.quote(str(folder.path))
    if not is_over:
        return [
            ("watch it", f"fedsplit watch {path}"),
            ("make this report again", f"fedsplit report {path}"),
            ("continue it, if it was stopped", f"THE COMMAND THAT BEGAN IT resume={path}"),
        ]
    return [
        ("compare it", f"fedsplit compare {path} ANOTHER_RUN"),
        *generation_commands(run, folder),
    ]


def generation_commands(run: RunSpec, folder: RunFolder) -> list[tuple[str, str]]:
    """Return the commands that generate with a run's model; none if it has no language model."""
    path = shlex.quote(str(folder.path))
    if run.client_weights.sealed:
        key = shlex.quote(str(next(folder.path.glob("privacy/*/seal.key"), "KEY")))
        join = f"fedsplit join {path} --key {key} --out whole"
        return [("join it at a client", join)]
    if run.task != "causal_lm" or run.baseline != "none":
        return []
    return [
        ("generate with it", f"fedsplit serve {path}"),
        ("  and beside it", f'fedsplit generate --run {path} "SOME TEXT"'),
    ]
