"""The progress bar of a run in this process: on a terminal, beside the lines of the rounds."""

import io
import os
import pty
import re
import threading
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from fedsplit.runs.folder import RunFolder
from fedsplit.spec import RunSpec, TrainSpec
from fedsplit.telemetry.events import StepTaken
from simulations.progress import ProgressBar, progress_on
from simulations.single import run_one
from tests.edge.federation import spec_for
from tests.edge.rounds import round_stats

CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def progress() -> Progress:
    return progress_on(Console(file=io.StringIO(), force_terminal=True, width=100))


def step(*clients: str) -> StepTaken:
    return StepTaken(version=1, clients=clients, num_tokens=64, taken=1, lr=0.1, gradient_norm=1.0)


def test_steps_move_the_bar_and_a_round_corrects_it(progress: Progress) -> None:
    run = RunSpec(clients=2, train=TrainSpec(rounds=3, local_steps=10))
    bar = ProgressBar(progress, run)
    (task,) = progress.tasks
    assert (task.completed, task.total, task.description) == (0, 60, "round 1/3")
    bar.on_event(step("client-0", "client-1"))
    bar.on_event(step("client-1"))
    assert (task.completed, task.fields["loss"]) == (3, "-")
    # The round took 16 steps, not 20, and the others are expected to take as many.
    bar.on_event(round_stats(1, 3.0, steps=16))
    assert (task.completed, task.total, task.description) == (16, 48, "round 2/3")
    assert task.fields["loss"] == "4.0000"
    bar.on_event(round_stats(2, 2.0, steps=16))
    bar.on_event(round_stats(3, 1.0, steps=16))
    assert (task.completed, task.total, task.description) == (48, 48, "round 3/3")


def test_a_resumed_run_has_the_rounds_that_are_left(progress: Progress) -> None:
    run = RunSpec(clients=2, train=TrainSpec(rounds=3, local_steps=10))
    ProgressBar(progress, run, done=2)
    ProgressBar(progress, replace(run, train=TrainSpec(local_epochs=1.0, schedule="constant")))
    resumed, epochs = progress.tasks
    assert (resumed.total, resumed.description) == (20, "round 3/3")
    assert epochs.total is None


def test_a_terminal_shows_the_bar_and_then_the_lines_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    run = spec_for(tmp_path, "train.rounds=2", "train.local_steps=2")
    ours, theirs = pty.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        # The end of a terminal is an error on Linux.
        try:
            while chunk := os.read(ours, 4096):
                chunks.append(chunk)
        except OSError:
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal, redirect_stdout(terminal):
        run_one(run)
    reader.join()
    os.close(ours)
    text = CODES.sub("", b"".join(chunks).decode()).replace("\r", "\n")
    assert re.search(r"round 1/2 .* 0/12 steps  loss -", text)
    lines = text.splitlines()
    for stats in RunFolder(tmp_path / "runs" / run.name).rounds():
        assert stats.line in lines
