"""A run at the level debug with traces: what is in its files and its log, and what is not."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fedsplit.cli import main
from fedsplit.runs.timeline import Traces
from tests.house.source import ROOT

WORDS = [f"zyxo{number}qua" for number in range(100, 160)]
"""Words that no line of a program has by chance."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run: its log as JSON, and its traces."""
    folder = tmp_path_factory.mktemp("traced")
    (folder / "corpus").mkdir()
    for number in range(4):
        lines = [
            " ".join(WORDS[(7 * line + 3 * at + number) % 60] for at in range(60))
            for line in range(20)
        ]
        (folder / "corpus" / f"{number}.txt").write_text("\n\n".join(lines))
    words = "experiment=toy train.rounds=1 data.kind=text data.path=corpus launch.traces=traces"
    options = "launch.trace_share=1 --log-format json --log-level=debug"
    done = subprocess.run(
        [sys.executable, "-m", "simulations.run", *words.split(), *options.split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    (folder / "log.jsonl").write_text(done.stderr)
    return folder


def test_a_step_is_one_trace_over_client_link_queue_compute_and_reply(run: Path) -> None:
    traces = Traces([run / "traces"])
    steps = [spans for spans in traces if any(span.name == "train_step" for span in spans)]
    assert len(steps) == 4  # of two clients, two each
    for spans in steps:
        by_id = {span.id: span for span in spans}
        assert len(by_id) == len(spans)
        ways = Counter()
        for span in spans:
            way = [span]
            while way[-1].parent:
                way.append(by_id[way[-1].parent])
            ways[" < ".join(f"{each.process.rstrip('01')} {each.name}" for each in way)] += 1
            assert len({each.fields["client"] for each in way}) == 1
        at_server = "server serve < client- attempt < client- {} < client- train_step"
        for kind in ("forward", "backward", "step"):
            around = at_server.format(kind)
            assert ways[around] == 1
            for name in ("queue", "compute", "reply"):
                assert ways[f"server {name} < {around}"] == 1


def test_a_step_can_be_followed_in_the_log_by_the_id_of_its_trace(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(line["fedsplit"]["run"] == "toy" for line in lines if "fedsplit" in line)
    for spans in Traces([run / "traces"]):
        told = [line for line in lines if line.get("trace", {}).get("id") == spans[0].trace]
        found = {line["span"]["id"]: line for line in told}
        assert set(found) == {span.id for span in spans}
        for span in spans:
            line = found[span.id]
            assert line["message"].startswith(f"{span.name} took ") and line["log.level"] == "debug"
            assert line["event"]["duration"] == span.ended - span.began
            assert {name: str(value) for name, value in line["fedsplit"].items()}.items() >= (
                span.fields.items()
            )


def test_no_line_of_the_log_and_no_trace_has_a_word_of_the_corpus_or_a_secret(run: Path) -> None:
    files = [run / "log.jsonl", *(run / "traces").iterdir()]
    text = "".join(file.read_text() for file in files)
    assert len(text) > 100_000
    assert not [word for word in (*WORDS, "zyxo", "qua ") if word in text]
    # Ids of traces and spans have 32 and 16 digits, a session is cut, and a token has more.
    assert not re.search(r"[0-9A-Za-z_-]{40,}", text)
    assert not re.search(r"tensor\(|\[-?\d+\.\d+, ", text)


def test_a_timeline_is_a_picture_and_a_table(run: Path, tmp_path: Path, capsys) -> None:
    picture = tmp_path / "step.svg"
    assert main(["timeline", str(run / "traces"), "--out", str(picture)]) == 0
    told = capsys.readouterr().out
    assert "<svg" in picture.read_text() and "train_step of" in told
    spans = sum(map(len, Traces([run / "traces"])))
    assert sum(int(row.split()[2].replace(",", "")) for row in told.splitlines()[2:-1]) == spans


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["none"], "none cannot be read"),
        (["{run}/corpus"], "no span in"),
        (["{run}/log.jsonl"], "line 1: no spans of fedsplit"),
        (["{run}/traces", "--trace", "xyz"], "is the begin of 0 traces"),
        (["{run}/traces", "--out", "x.docx"], "x.docx"),
    ],
)
def test_what_is_no_trace_is_refused(given, text, run: Path, capsys) -> None:
    assert main(["timeline", *(word.format(run=run) for word in given)]) == 1
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("half", ['{"resourceSpans":[{"res', '{"resourceSpans":[{"resource":{}'])
def test_half_a_line_of_a_file_is_passed_over(half: str, run: Path, tmp_path: Path) -> None:
    (whole,) = (run / "traces").glob("server-*")
    killed = tmp_path / "killed.jsonl"
    killed.write_text(f"{half}\n{whole.read_text()}{half}")
    assert len(Traces([killed])) == len(Traces([whole]))


def test_a_file_that_is_given_twice_counts_once(run: Path) -> None:
    folder = run / "traces"
    assert Traces([folder, *folder.iterdir()]).rows == Traces([folder]).rows


def test_an_attribute_may_have_no_value(run: Path, tmp_path: Path) -> None:
    (whole,) = (run / "traces").glob("server-*")
    empty = '"attributes":[{"key":"none","value":{}},'
    file = tmp_path / "empty.jsonl"
    file.write_text(whole.read_text().replace('"attributes":[', empty))
    assert Traces([file]).of()[0].fields["none"] == ""
