"""`fedsplit watch`: the figures of a run in a terminal while it trains, and in a pipe."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from fedsplit.cli import main
from fedsplit.config import to_yaml
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.live import watch
from fedsplit.spec import RunSpec, TrainSpec
from fedsplit.telemetry.round import ClientStats
from tests.edge.rounds import round_stats


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunSpec(name="run", train=TrainSpec(rounds=3))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(run))
    return RunFolder(tmp_path / "run")


def test_a_terminal_shows_each_round_until_the_run_has_ended(folder: RunFolder) -> None:
    out = io.StringIO()
    screens: list[str] = []

    def sleep(_: float) -> None:
        screens.append(out.getvalue())
        number = len(screens)
        clients = {"client-0": ClientStats(loss=2.5, tokens=100, steps=10, refused=7)}
        folder.metrics.append(round_stats(number, 4.0 - number, refused=7, by_client=clients))
        if number == 2:
            folder.model.mkdir()

    watch(folder, Console(file=out, force_terminal=True, width=100, height=60), sleep)
    assert "no round is finished yet" in screens[0] and "0 of 3 rounds" in screens[0]
    assert "1 of 3 rounds" in screens[1] and "1.5000 bits/byte" in screens[1]
    assert len(screens) == 2
    end = out.getvalue()[len(screens[1]) :]
    for part in ("finished, 2 of 3 rounds", "409.6", "refused steps", "1-2", "privacy=off"):
        assert part in end
    assert ["client-0", "100.0%", "200", "20"] in [line.split()[:4] for line in end.splitlines()]


def test_a_pipe_gets_the_figures_once(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.metrics.append(round_stats(1, 3.0))
    assert main(["watch", str(folder.path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("run  stopped, 1 of 3 rounds\n") and "\x1b" not in printed
    assert "no late and no refused contributions" in printed
    assert main(["watch", str(folder.path.parent)]) == 1
    assert "is not a run's folder" in capsys.readouterr().err
