"""Carries out one run, in this process or in Flower's processes.

The modules that train are imported only for a run in this process, because importing takes seconds.
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
    """Claim a folder for the run, or take that of the run it resumes.

    Returns:
        The run under the folder's name, and the folder.
    """
    resumed = RunFolder.to_resume(run)
    if resumed:
        # Refused here, before this process writes its log into the folder of a run in progress.
        with resumed.held():
            pass
    folder = resumed or RunFolder.claim(Path(run.launch.run_dir), run.name)
    launch = replace(run.launch, run_dir=str(folder.path.parent))
    resume = str(folder.path) if resumed else ""
    return replace(run, name=folder.path.name, resume=resume, launch=launch), folder


def carry_out(run: RunSpec, folder: RunFolder) -> None:
    """Train a run, and remove its folder if nothing was written to it.

    Args:
        run: The run, under the folder's name.
        folder: The folder that `claim` returned.

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

    # The program prints each round itself.
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
