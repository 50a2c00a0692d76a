"""A run that is interrupted, resumed and loaded again, with all that it unpickles on stdout.

Run as a script with a folder. The client trains over gRPC, as in a deployed run.
"""

import pickle
import sys
import traceback
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

FOUND: list[str] = []


def note_unpickling(event: str, arguments: tuple[object, ...]) -> None:
    if event == "pickle.find_class":
        caller = traceback.extract_stack()[-2]
        FOUND.append(f"{arguments[1:]} at {caller.filename}:{caller.lineno}")


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


if __name__ == "__main__":
    sys.addaudithook(note_unpickling)
    train(Path(sys.argv[1]))
    print(f"unpickled: {FOUND}")
    pickle.loads(pickle.dumps(OrderedDict()))  # or an idle hook would pass
    print(f"then: {len(FOUND)}")
