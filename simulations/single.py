"""Carries out one run, from its folder to its end: in this process, or by Flower's own.

What trains is imported when it is to train here, so that a program that only starts it is quick.
"""

import logging
from dataclasses import replace
from pathlib import Path

from fedsplit.config import to_yaml
from fedsplit.runs.folder import RunFolder
from fedsplit.spec import RunSpec
from simulations.launch import run_flwr

_APP = Path(__file__).resolve().parent.parent


def claim(run: RunSpec) -> tuple[RunSpec, RunFolder]:
    """A folder for the run, new or the one that it resumes, and the run under its name."""
    resumed = RunFolder.to_resume(run)
    folder = resumed or RunFolder.claim(Path(run.launch.run_dir), run.name)
    launch = replace(run.launch, run_dir=str(folder.path.parent))
    resume = str(folder.path) if resumed else ""
    return replace(run, name=folder.path.name, resume=resume, launch=launch), folder


def carry_out(run: RunSpec, folder: RunFolder) -> None:
    """Train; a folder that nothing was left in is given back.

    Args:
        run: Under the folder's name.
        folder: The one claimed for it.

    Raises:
        FedsplitError: The run failed.
    """
    launch = _inline if run.launch.kind == "inline" else _flwr
    try:
        launch(run, folder)
    finally:
        folder.give_back()


def _inline(run: RunSpec, folder: RunFolder) -> None:
    from fedsplit.console import quiet_libraries
    from fedsplit.flower import client_app, server_app
    from fedsplit.flower.inline import run_inline

    logging.getLogger("flwr").setLevel(logging.WARNING)
    quiet_libraries()
    run_inline(
        server_app.app,
        client_app.app,
        num_clients=run.num_nodes,
        run_config=_run_config(run, folder),
        workers=run.launch.workers,
    )


def _flwr(run: RunSpec, folder: RunFolder) -> None:
    with (folder.path / "flower.log").open("w", encoding="utf-8") as log:
        run_flwr(
            _APP,
            run_config=_run_config(run, folder),
            num_clients=run.num_nodes,
            workers=run.launch.workers,
            log_path=folder.path / "superlink.log",
            start_timeout_s=run.launch.start_timeout_s,
            on_output=lambda line: print(line, file=log, flush=True),
        )


def _run_config(run: RunSpec, folder: RunFolder) -> dict[str, str]:
    return {"config": to_yaml(run), "run-dir": str(folder.path.parent)}
