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

PROCESSES = {
    *("subprocess.Popen", "os.system", "os.posix_spawn", "os.spawn", "os.exec"),
    *("os.fork", "os.forkpty", "pty.spawn"),
}
OURS = tuple(f"{Path(__file__).parents[2] / name}/" for name in ("fedsplit", "strategies"))


class Notes:
    """An audit hook that notes what is executed; code in `folder` is foreign."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: list[str] = []

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        noted = event == "pickle.find_class" or event in PROCESSES
        if event == "exec":
            noted = self.is_foreign(getattr(arguments[0], "co_filename", ""))
        elif event == "compile":
            caller = sys._getframe(1).f_code.co_filename
            noted = self.is_foreign(arguments[1]) or caller.startswith(OURS)
        elif event == "import":
            noted = self.is_foreign(arguments[1]) or any(map(self.is_foreign, sys.path))
        if noted:
            caller = traceback.extract_stack()[-2]
            self.found.append(f"{event} {arguments[:2]} at {caller.filename}:{caller.lineno}")

    def is_foreign(self, path: object) -> bool:
        """Whether code of this file would come from the run's folder."""
        return isinstance(path, str) and self.folder in Path(path).parents


def train(folder: Path) -> None:
    from fedsplit.errors import Diverged
    from tests.edge.federation import federate, joined, spec_for
    from tests.edge.resuming import breaking_in

    run = spec_for(folder, "clients=1", "train.rounds=2", "train.save_every=1")
    try:
        federate(run, breaking_in(round=2))
    except Diverged as broken:
        print(broken)
    done = federate(replace(run, resume="auto"))
    print(f"{len(done.rounds())} rounds, {len(joined(done))} tensors")


def do_all_of_it(folder: Path) -> None:
    """Do what the hook looks for, or an idle hook would pass."""
    pickle.loads(pickle.dumps(OrderedDict()))
    subprocess.run(["true"], check=True)
    os.system("true")
    code = folder / "code.py"
    code.write_text("")
    runpy.run_path(str(code))


if __name__ == "__main__":
    notes = Notes(Path(sys.argv[1]).resolve())
    sys.addaudithook(notes)
    train(notes.folder)
    print(f"executed: {notes.found}")
    notes.found.clear()
    do_all_of_it(notes.folder)
    events = {note.split()[0] for note in notes.found}
    print(f"then: {' '.join(sorted(events))}")
