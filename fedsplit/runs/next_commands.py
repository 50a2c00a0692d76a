"""The commands with which one goes on after a run."""

import shlex

from fedsplit.runs.folder import RunFolder
from fedsplit.spec import RunSpec


def next_commands(run: RunSpec, folder: RunFolder) -> list[tuple[str, str]]:
    """Return what one can do with a run and the command for it."""
    path = shlex.quote(str(folder.path))
    if not folder.is_finished:
        return [
            ("watch it", f"fedsplit watch {path}"),
            ("make this report again", f"fedsplit report {path}"),
            ("continue it, if it was stopped", f"THE COMMAND THAT BEGAN IT resume={path}"),
        ]
    commands = [("compare it", f"fedsplit compare {path} ANOTHER_RUN")]
    if run.client_weights.sealed:
        key = next(folder.path.glob("privacy/*/seal.key"), "KEY")
        join = f"fedsplit join {path} --key {shlex.quote(str(key))} --out whole"
        commands.append(("join it at a client", join))
    elif run.task == "causal_lm" and run.baseline == "none":
        generate = f'fedsplit generate --run {path} "SOME TEXT"'
        commands.append(("generate with it", f"fedsplit serve {path}"))
        commands.append(("  and beside it", generate))
    return commands
