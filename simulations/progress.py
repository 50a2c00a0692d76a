"""The progress bar of a run in this process: its steps, loss, tokens per second, remaining time."""

from threading import Lock

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedsplit.spec import RunSpec
from fedsplit.telemetry.events import Event, StepTaken
from fedsplit.telemetry.round import RoundStats
from fedsplit.telemetry.sinks import Sink


def progress_on(console: Console) -> Progress:
    """Return a display of bars on a terminal, which disappears at its end."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("steps  loss {task.fields[loss]}  {task.fields[speed]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
        transient=True,
        expand=True,
        # Round lines are printed on the console, so that they are not wrapped.
        redirect_stdout=False,
    )


class ProgressBar(Sink):
    """A bar with the steps of all clients, as far as the trunk counts them, or else by rounds.

    The number of all steps is estimated from the settings, and after a round from the steps that
    the rounds took, which `train.local_epochs`, `train.max_steps` and the policy decide.

    Args:
        progress: The display.
        run: The settings.
        done: The rounds before the first one, in a resumed run.
    """

    def __init__(self, progress: Progress, run: RunSpec, done: int = 0) -> None:
        self._progress = progress
        self._unit = "tokens"
        self._lock = Lock()
        self._rounds = self._steps = self._tokens = 0
        self._in_round = self._tokens_in_round = 0
        known = not run.train.local_epochs
        per_round = run.clients * run.train.local_steps
        left = run.train.rounds - done
        self._task = progress.add_task(
            _name_of(done, run.train.rounds),
            total=left * per_round if known else None,
            loss="-",
            speed="",
        )

    def on_event(self, event: Event) -> None:
        """Show a step or a round."""
        with self._lock:
            if isinstance(event, StepTaken):
                self._in_round += len(event.clients)
                self._tokens_in_round += event.num_tokens
                self._show()
            elif isinstance(event, RoundStats):
                self._rounds += 1
                self._steps += event.steps
                self._tokens += event.tokens
                self._unit = event.unit
                self._in_round = self._tokens_in_round = 0
                left = event.rounds - event.round
                self._show(
                    description=_name_of(event.round, event.rounds),
                    total=self._steps + left * self._steps / self._rounds,
                    loss=f"{event.loss:.4f}",
                )

    def _show(self, **changes: object) -> None:
        steps = self._steps + self._in_round
        self._progress.update(self._task, completed=steps, **changes)  # type: ignore[arg-type]
        tokens = self._tokens + self._tokens_in_round
        if steps and (speed := self._progress.tasks[0].speed):
            text = f"{speed * tokens / steps:,.0f} {self._unit}/s"
            self._progress.update(self._task, speed=text)


def _name_of(done: int, rounds: int) -> str:
    return f"round {min(done + 1, rounds)}/{rounds}"
