"""Runs one experiment, or a sweep of them: composes the config, launches, prints, leaves a folder.

python -m simulations.run experiment=toy
python -m simulations.run -m sharding=iid,natural
python -m simulations.run --help
"""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import fedsplit.config
from fedsplit.config import to_yaml
from fedsplit.console import quiet_libraries
from fedsplit.flower import client_app, server_app
from fedsplit.flower.inline import run_inline
from fedsplit.metrics import closing_table
from fedsplit.run_folder import RunFolder
from fedsplit.spec import RunSpec
from simulations.launch import run_flwr

_APP = Path(__file__).resolve().parent.parent
_POLL_S = 0.2


def run_one(run: RunSpec) -> None:
    """Run one experiment to its end and print it as it goes."""
    folder = RunFolder.claim(Path(run.launch.run_dir), run.name)
    run = replace(run, name=folder.path.name)
    print(_heading(run), flush=True)
    launch = _inline if run.launch.kind == "inline" else _flwr
    try:
        with _printing_rounds(folder):
            launch(run, folder)
    finally:
        folder.give_back()
    print(f"\n{closing_table(folder.rounds())}")
    print(f"\nleft in {folder.path}: {_left(folder)}", flush=True)


def _inline(run: RunSpec, folder: RunFolder) -> None:
    logging.getLogger("flwr").setLevel(logging.WARNING)
    quiet_libraries()
    run_inline(
        server_app.app,
        client_app.app,
        num_clients=run.clients,
        run_config=_run_config(run, folder),
        workers=run.launch.workers,
    )


def _flwr(run: RunSpec, folder: RunFolder) -> None:
    with (folder.path / "flower.log").open("w", encoding="utf-8") as log:
        run_flwr(
            _APP,
            run_config=_run_config(run, folder),
            num_clients=run.clients,
            workers=run.launch.workers,
            log_path=folder.path / "superlink.log",
            start_timeout_s=run.launch.start_timeout_s,
            on_output=lambda line: print(line, file=log, flush=True),
        )


def _run_config(run: RunSpec, folder: RunFolder) -> dict[str, str]:
    return {"config": to_yaml(run), "run-dir": str(folder.path.parent)}


@contextmanager
def _printing_rounds(folder: RunFolder) -> Iterator[None]:
    """Print each round's line once it stands in the folder, whatever process put it there."""
    over = threading.Event()

    def follow() -> None:
        printed = 0
        while True:
            last_look = over.wait(_POLL_S)
            rounds = folder.rounds()
            for stats in rounds[printed:]:
                print(stats.line, flush=True)
            printed = len(rounds)
            if last_look:
                return

    thread = threading.Thread(target=follow, name="round-printer")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _heading(run: RunSpec) -> str:
    return (
        f"run {run.name} ({run.fingerprint}): {run.model}, split {run.split}, "
        f"{run.data.kind} corpus, {run.sharding.kind} sharding over {run.clients} clients, "
        f"policy {run.policy.kind}, launch {run.launch.kind}"
    )


def _left(folder: RunFolder) -> str:
    names = (f"{path.name}/" if path.is_dir() else path.name for path in folder.path.iterdir())
    return " ".join(sorted(names))


if __name__ == "__main__":
    try:
        fedsplit.config.main(run_one)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # a plain exit waits for clients, and those for a trunk that is gone
