"""The report of a run: what it says, in any browser window, and of any texts and states."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedsplit.cli import main
from fedsplit.config import compose, to_yaml
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.report import report_of, write_report
from fedsplit.runs.summary import Summary
from fedsplit.spec import ModelSpec, PolicySpec, PrivacySpec, RunSpec, TrainSpec
from fedsplit.telemetry.round import ClientStats
from tests.edge.chromium import PROGRAM, Chromium
from tests.edge.rounds import round_stats

HOSTILE = "<script>alert(1)</script><img src=http://127.0.0.1/x> " + "w" * 300
DISTURBED = dict(late=1, failed=2, refused=3, short_steps=4, clipped_gradients=5, repeats=6)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    if PROGRAM is None:
        pytest.skip("Chromium is not installed; try: apt-get install chromium")
    with Chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def leave(path: Path, run: RunSpec, rounds: int, **changes: float) -> RunFolder:
    """A folder of a run with this many rounds, of which every second one was evaluated."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(replace(run, name=path.name)))
    (path / "sample.txt").write_text(f"{HOSTILE}\n")
    folder = RunFolder(path)
    for number in range(1, rounds + 1):
        stats = round_stats(number, 3.0 if number % 2 else math.nan, **changes)
        clients = {
            HOSTILE: ClientStats(),
            "client-0": ClientStats(loss=2.5, tokens=75, steps=8, bytes_up=3 << 20),
            "client-1": ClientStats(loss=2.5, tokens=25, steps=2, repeated=1, refused=3),
        }
        folder.metrics.append(replace(stats, by_client=clients))
    return folder


CASES = {
    "a disturbed run with noise": (RunSpec(privacy=PrivacySpec(kind="noise")), 3),
    "one round": (RunSpec(), 1),
    "a classifier": (compose(["experiment=images"]), 3),
    "many rounds": (RunSpec(train=TrainSpec(rounds=10**6)), 300),
}
CHANGES: dict[str, dict[str, float]] = {
    "a disturbed run with noise": {
        **DISTURBED,
        "bits": 4.5,
        "label_bits": 2.0,
        "went_back_from": 3,
    },
    "one round": {},
    "a classifier": {"accuracy": 0.75},
    "many rounds": {"bytes_up": 1 << 50, "tokens": 10**12, "virtual_seconds": 1e6},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_report_shows_everything_in_each_window(
    name: str, browser: Chromium, tmp_path: Path
) -> None:
    run, rounds = CASES[name]
    page = write_report(leave(tmp_path / ("r" * 64), run, rounds, **CHANGES[name]))
    require_whole(browser, page, charts=4 if "bits" in CHANGES[name] else 3, text=HOSTILE)


def require_whole(browser: Chromium, page: Path, *, charts: int, text: str) -> None:
    """Require that a page shows everything in a window and on a phone, and loads nothing."""
    for width in (1280, 390):
        shown = browser.open(page, width)
        assert (browser.complaints(), browser.requests()) == ([], [page.as_uri()])
        assert shown["cut"] == [] and shown["width"] <= width
        assert shown["charts"] == charts and text in shown["text"]


def test_a_comparison_shows_everything_in_each_window(browser: Chromium, tmp_path: Path) -> None:
    runs = [
        RunSpec(),
        RunSpec(seed=1),
        RunSpec(model=ModelSpec(pretrained="models/<b>" + "w" * 200)),
        RunSpec(policy=PolicySpec(kind="async")),
    ]
    paths = [leave(tmp_path / f"run-{n}", run, 3).path for n, run in enumerate(runs)]
    write_report(RunFolder(paths[0]))
    assert main(["compare", *map(str, paths), "--out", str(tmp_path / "compared")]) == 0
    page = tmp_path / "compared" / "report.html"
    text = "4 runs in 3 rows; runs that differ only in the seed"
    require_whole(browser, page, charts=4, text=text)
    html = page.read_text(encoding="utf-8")
    assert '<a href="../run-0/report.html">' in html and html.count("<a href") == 1
    assert "models/&lt;b&gt;ww" in html


def test_the_browser_finds_what_is_wrong_with_a_page(browser: Chromium, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<script>console.error('no')</script><img src='missing.png'>"
        "<p id=wide style='width: 2000px'>x</p><p style='width: 9px; overflow: hidden'>wwwww</p>"
        "<svg width=20 height=20><text id=out x=15 y=10>wwww</text></svg>"
    )
    shown = browser.open(page, 390)
    assert {part for cut in shown["cut"] for part in ("wide", "hidden", "out") if part in cut} == {
        "wide",
        "hidden",
        "out",
    }
    assert browser.complaints() and len(browser.requests()) == 2 and shown["width"] > 390


def test_a_report_has_the_figures_of_the_run(tmp_path: Path) -> None:
    folder = leave(tmp_path / "run", RunSpec(train=TrainSpec(rounds=3)), 3, **DISTURBED)
    text = " ".join(re.sub(r"<[^>]*>", " ", report_of(Summary.read(folder))).split())
    for part in (
        "stopped, 3 of 3 rounds",
        "Held-out loss 1.5000 bits/byte 3.0000 nats/token; 1.5000 bits/byte after round 1",
        "Bytes per step 409.6 KiB 307.2 KiB up and 102.4 KiB down per client step",
        "Duration 6.0 s training of 3 of 3 rounds, 50 tokens/s",
        "Told the server no bound",
        "client-0 75.0 % 225 24 3 2.5000 0 0 0 9.0 MiB 0 B",
        "client-1 25.0 % 75 6 3 2.5000 3 9 0 0 B 0 B",
        "steps without a client it was awaited until policy.deadline_s was over 12 1-3",
        "activations and gradients, up 9.0 MiB 3.0 MiB 307.2 KiB",
        "train.rounds The number of rounds. Client weights are aggregated after each of them. 3",
        f"THE COMMAND THAT BEGAN IT resume={folder.path}",
    ):
        assert part in text


def test_a_report_is_a_function_of_the_folder_alone(tmp_path: Path) -> None:
    folder = leave(tmp_path / "run", RunSpec(), 2)
    assert report_of(Summary.read(folder)) == report_of(Summary.read(folder))


def test_a_report_says_how_the_run_ended(tmp_path: Path) -> None:
    folder = leave(tmp_path / "run", RunSpec(), 2)
    assert Summary.read(folder).state == "stopped"
    with folder.held():
        assert Summary.read(folder).state == "training"
    folder.set_divergence("too large")
    folder.model.mkdir()
    assert Summary.read(folder).state == "diverged: too large"
    assert f"too large, 2 of {RunSpec().train.rounds} rounds" in report_of(Summary.read(folder))
    folder.set_divergence("")
    assert Summary.read(folder).state == "finished"


def test_a_report_has_what_an_audit_measured(tmp_path: Path) -> None:
    folder = leave(tmp_path / "run", RunSpec(), 1)
    folder.model.mkdir()
    assert Summary.read(folder).measured_leak == ""
    (folder.model / "README.md").write_text("# x\n\n## Measured\n\n| a |\n\n`leak: text 90%`\n")
    assert "Measured: leak: text 90%" in report_of(Summary.read(folder))


def test_the_command_writes_the_report_of_a_stopped_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = leave(tmp_path / "run", RunSpec(), 1)
    assert main(["report", str(folder.path)]) == 0
    assert capsys.readouterr().out == f"{folder.path / 'report.html'}\n"
    assert (folder.path / "report.html").read_text().startswith("<!doctype html>")
    (folder.path / "metrics.jsonl").unlink()
    assert main(["report", str(folder.path)]) == 1
    assert "has no finished round yet" in capsys.readouterr().err


def test_a_report_made_in_the_folder_can_be_read_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = leave(tmp_path / "run", RunSpec(), 1)
    monkeypatch.chdir(folder.path)
    assert main(["report", "."]) == 0
    page = Path("report.html").read_text()
    assert "<title>run</title>" in page and f"fedsplit watch {folder.path}<" in page
