"""TensorBoard as a sink: a curve for each number of rounds and steps, in the folder of the run."""

import math
from pathlib import Path
from typing import Any

from fedsplit.errors import ConfigError
from fedsplit.telemetry.events import Event, StepTaken
from fedsplit.telemetry.round import RoundStats
from fedsplit.telemetry.sinks import Sink


class TensorBoard(Sink):
    """Writes `tensorboard/` in the folder of a run, for `launch.sinks`.

    Args:
        folder: The folder of the run.

    Raises:
        ConfigError: tensorboard is not installed.
    """

    def __init__(self, *, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as exc:
            raise ConfigError(
                "launch.sinks names TensorBoard, but tensorboard is not installed here: pip "
                "install 'fedsplit[tensorboard]', or leave it out"
            ) from exc
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def on_event(self, event: Event) -> None:
        """Write the numbers of a round or a step that are finite."""
        match event:
            case RoundStats():
                numbers, group, place = event.numbers, "round", event.round
            case StepTaken():
                numbers = {"lr": event.lr, "gradient_norm": event.gradient_norm}
                numbers["wait_s"] = max(event.waits_s, default=0.0)
                group, place = "step", event.version
            case _:
                return
        for name, number in numbers.items():
            if math.isfinite(number):
                self._writer.add_scalar(f"{group}/{name}", number, place)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
