"""Times the rounds of the default run, with or without checkpoints."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

from simulations.faults.points import POINTS
from simulations.faults.services import ForkedModule
from simulations.faults.watcher import Passage, environment, watching

_ROOT = Path(__file__).parents[2]


def round_seconds(save_every: int, rounds: int) -> list[float]:
    """Return the seconds from round to round of an inline run, its checkpoint included.

    Args:
        save_every: The run's `train.save_every`.
        rounds: The number of values.
    """
    times: list[float] = []

    def note(_: Passage) -> None:
        times.append(time.monotonic())

    with TemporaryDirectory(prefix="faults-", dir="/tmp") as name:
        folder = Path(name)
        words = [f"train.rounds={rounds + 1}", f"train.save_every={save_every}"]
        service = ForkedModule(
            name="run",
            command=["simulations.run", *words, f"launch.run_dir={folder / 'runs'}"],
            environment=environment(folder),
            folder=_ROOT,
            log=folder / "run.log",
        )
        with watching(folder, [POINTS["round recorded"]], note):
            service.start()
            while service.exit_code is None:
                service.tend(restart=False)
                time.sleep(0.05)
        assert service.exit_code == 0, service.log.read_text(encoding="utf-8")
    return [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
