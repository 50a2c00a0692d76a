"""Times the rounds of a run, with or without checkpoints."""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from fedsplit.errors import Internal
from simulations.faults.points import POINTS
from simulations.faults.services import ForkedModule
from simulations.faults.watcher import Passage, environment, watching
from simulations.faults.ways import runs_in

_ROOT = Path(__file__).parents[2]


def round_seconds(
    save_every: int, rounds: int, settings: Callable[[Path], list[str]]
) -> list[float]:
    """Return the seconds from round to round of an inline run, its checkpoint included.

    Args:
        save_every: The run's `train.save_every`.
        rounds: The number of values.
        settings: Returns the run's other settings for a folder.
    """
    times: list[float] = []

    def note(_: Passage) -> None:
        times.append(time.monotonic())

    with TemporaryDirectory(prefix="faults-", dir="/tmp") as name:
        folder = Path(name)
        words = [*settings(folder), f"train.rounds={rounds + 1}"]
        words += [f"train.save_every={save_every}", f"launch.run_dir={runs_in(folder)}"]
        words += ["policy.missing=drop"]  # a run without checkpoints cannot wait
        service = ForkedModule(
            name="run",
            command=["simulations.run", *words],
            environment=environment(folder),
            folder=_ROOT,
            log=folder / "run.log",
        )
        with watching(folder, [POINTS["round recorded"]], note):
            service.start()
            while service.exit_code is None:
                service.tend(restart=False)
                time.sleep(0.05)
        if service.exit_code:
            raise Internal(f"the run failed:\n{service.log.read_text(encoding='utf-8')}")
    return [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
