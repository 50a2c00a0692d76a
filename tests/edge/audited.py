"""A run that is interrupted, resumed and loaded again, with all that it executes on stdout.

Run as a script with a folder. The client trains over gRPC, as in a deployed run. Noted are:
unpickled classes, new processes, and code that comes from the folder or is compiled by ours.
"""

import os
import pickle
import runpy
import subprocess
import sys
import traceback
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

FOLDER = Path(sys.argv[-1]).resolve()  # pytest imports this module, to look for doctests
FOUND: list[str] = []
PROCESSES = {
    *("subprocess.Popen", "os.system", "os.posix_spawn", "os.spawn", "os.exec"),
    *("os.fork", "os.forkpty", "pty.spawn"),
}
OURS = tuple(f"{Path(__file__).parents[2] / name}/" for name in ("fedsplit", "strategies"))


def is_foreign(path: object) -> bool:
    """Whether code of this file would come from the run's folder."""
    return isinstance(path, str) and FOLDER in Path(path).parents


def note_execution(event: str, arguments: tuple[object, ...]) -> None:
    noted = event == "pickle.find_class" or event in PROCESSES
    if event == "exec":
        noted = is_foreign(getattr(arguments[0], "co_filename", ""))
    elif event == "compile":
        caller = sys._getframe(1).f_code.co_filename
        noted = is_foreign(arguments[1]) or caller.startswith(OURS)
    elif event == "import":
        noted = is_foreign(arguments[1]) or any(map(is_foreign, sys.path))
    if noted:
        caller = traceback.extract_stack()[-2]
        FOUND.append(f"{event} {arguments[:2]} at {caller.filename}:{caller.lineno}")


def train() -> None:
    from fedsplit.errors import Diverged
    from tests.edge.federation import federate, joined, spec_for
    from tests.edge.resuming import breaking_in

    run = spec_for(FOLDER, "clients=1", "train.rounds=2", "train.save_every=1")
    try:
        federate(run, breaking_in(round=2))
    except Diverged as broken:
        print(broken)
    done = federate(replace(run, resume="auto"))
    print(f"{len(done.rounds())} rounds, {len(joined(done))} tensors")


def do_all_of_it() -> None:
    """Do what the hook looks for, or an idle hook would pass."""
    pickle.loads(pickle.dumps(OrderedDict()))
    subprocess.run(["true"], check=True)
    os.system("true")
    code = FOLDER / "code.py"
    code.write_text("")
    runpy.run_path(str(code))


if __name__ == "__main__":
    sys.addaudithook(note_execution)
    train()
    print(f"executed: {FOUND}")
    FOUND.clear()
    do_all_of_it()
    events = {note.split()[0] for note in FOUND}
    print(f"then: {' '.join(sorted(events))}")
