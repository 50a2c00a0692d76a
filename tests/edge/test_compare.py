"""Runs side by side: what is one row, what stands in it, and what cannot be compared."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from fedsplit.cli import main
from fedsplit.config import to_yaml
from fedsplit.runs.compare import COLUMNS, Table, draw_group, grouped, read_runs, rows_of
from fedsplit.runs.folder import RunFolder
from fedsplit.spec import DataSpec, PolicySpec, RunSpec, ShardingSpec
from tests.edge.rounds import round_stats

Leave = Callable[..., Path]


@pytest.fixture
def leave(tmp_path: Path) -> Leave:
    def make(name: str, run: RunSpec, losses: list[float], **changes: float) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(to_yaml(replace(run, name=folder.name)))
        for number, loss in enumerate(losses, start=1):
            RunFolder(folder).metrics.append(round_stats(number, loss, **changes))
        return folder

    return make


SYNC = RunSpec()
ASYNC = RunSpec(policy=PolicySpec(kind="async"))


def test_seeds_are_one_row_with_mean_and_spread(leave: Leave) -> None:
    paths = [
        leave("a", replace(SYNC, seed=1), [3.0, 2.0, 2.2]),
        leave("b", replace(SYNC, seed=0), [3.0, 2.4]),
        leave("c", ASYNC, [1.0], accuracy=0.5, virtual_seconds=4.0),
    ]
    row, other = rows_of(grouped(read_runs(paths)))
    assert row["seeds"] == [0, 1] and row["settings"] == {"policy.kind": "sync"}
    assert row["loss"] == pytest.approx(2.3) and row["best_loss"] == pytest.approx(2.2)
    assert row["loss_spread"] == pytest.approx(math.sqrt(0.02))
    assert row["bits_per_byte"] == pytest.approx(1.15)
    assert (row["rounds"], row["tokens"], row["steps"], row["seconds"]) == (2, 250, 25, 5.0)
    assert (row["bytes_up"], row["client_weights_bytes"]) == (2.5 * (3 << 20), 2.5 * (1 << 20))
    assert row["client_bytes"] == 5 << 20
    assert math.isnan(row["virtual_seconds"]) and math.isnan(row["accuracy"])
    assert (other["name"], other["accuracy"], other["virtual_seconds"]) == (
        "policy.kind=async",
        0.5,
        4.0,
    )
    assert math.isnan(other["loss_spread"])


def test_rows_are_named_by_what_differs(leave: Leave) -> None:
    run = replace(SYNC, policy=PolicySpec(sim_slowdown={"client-1": 2}))
    paths = [leave("a", SYNC, [1.0]), leave("b", run, [1.0]), leave("c", ASYNC, [1.0])]
    names = [group.name for group in grouped(read_runs(paths))]
    assert names == [
        "policy.kind=sync, policy.sim_slowdown={}",
        "policy.kind=sync, policy.sim_slowdown.client-1=2.0",
        "policy.kind=async, policy.sim_slowdown={}",
    ]


def test_rows_that_differ_in_many_settings_are_named_by_their_runs(leave: Leave) -> None:
    data = DataSpec(sequence_length=64, held_out=0.2, vocabulary=300, special_tokens="none")
    paths = [leave("a", SYNC, [1.0]), leave("b", replace(ASYNC, data=data), [1.0])]
    assert [group.name for group in grouped(read_runs(paths))] == ["a", "b"]
    other = leave("c/a", replace(ASYNC, data=data), [1.0])
    names = [group.name for group in grouped(read_runs([paths[0], other]))]
    assert names == [str(paths[0]), str(other)]


def test_a_run_that_was_repeated_counts_once(
    leave: Leave, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [leave("a", SYNC, [1.0]), leave("b", SYNC, [3.0])]
    (row,) = rows_of(grouped(read_runs([*paths, paths[0]])))
    assert (row["seeds"], row["loss"], row["name"]) == ([0], 3.0, "b")
    assert caplog.messages == [f"{paths[0]} is left out: {paths[1]} has the same settings and seed"]


def test_rounds_without_a_measurement_are_passed_over(leave: Leave) -> None:
    path = leave("a", SYNC, [3.0, math.nan, 2.0, math.nan])
    (run,) = read_runs([path])
    assert run.held_out("eval_loss") == [3.0, 2.0]
    assert run.curve("round") == [(1, 3.0), (3, 2.0)]
    assert run.curve("MiB between clients and server") == [(5.0, 3.0), (15.0, 2.0)]
    assert run.curve("virtual seconds") == []


def test_the_command_prints_a_table_and_leaves_it(
    leave: Leave, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sharded = replace(SYNC, sharding=ShardingSpec(kind="iid"))
    for seed in (0, 1):
        leave(f"many/a{seed}", replace(SYNC, seed=seed), [3.0, 2.0 + seed, 1.0 + seed])
        leave(f"many/b{seed}", replace(sharded, seed=seed), [4.0, 3.0 + seed])
    assert main(["compare", str(tmp_path / "many")]) == 0
    head, first, second, unlike, _, table, picture, report = capsys.readouterr().out.splitlines()
    assert head.split()[:6] == ["run", "seeds", "held-out", "loss", "best", "bits/byte"]
    assert "accuracy" not in head and "virtual s" not in head
    assert first.startswith("sharding.kind=natural      2  1.5000 +- 0.7071")
    assert second.startswith("sharding.kind=iid          2  3.5000 +- 0.7071")
    assert unlike == "the rows differ in what was trained: client steps and tokens"
    assert table == str(tmp_path / "compare" / "table.json")
    told = json.loads(Path(table).read_text())
    assert told["figures"] == {}
    assert [row["loss"] for row in told["rows"]] == [1.5, 3.5]
    assert told["rows"][0]["accuracy"] is None
    pixels = imread(picture)
    assert pixels.shape[1] == 4 * pixels.shape[0] * 6 / 4.5 and pixels[..., :3].std() > 0.05
    # What it left is no run, and does not stand in the way of a second time.
    assert main(["compare", str(tmp_path / "many"), str(tmp_path / "compare")]) == 0


def test_a_run_can_be_compared_before_its_held_out_loss_is_measured(
    leave: Leave, capsys: pytest.CaptureFixture[str]
) -> None:
    path = leave("many/a", SYNC, [math.nan])
    assert main(["compare", str(path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert "held-out loss" not in told[0] and Path(told[-2]).name == "compare.png"
    assert imread(told[-2]).size


def test_in_a_run_s_folder_the_comparison_is_left_beside_it(
    leave: Leave, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = replace(RunSpec(policy=PolicySpec(kind="async")), clients=3, seed=1)
    trained = replace(other, train=replace(other.train, rounds=9, lr=1e-5, batch_size=3))
    path = leave("many/a", SYNC, [3.0])
    leave("many/b", trained, [2.0])
    monkeypatch.chdir(path)
    assert main(["compare", ".", "../b"]) == 0
    told = capsys.readouterr().out
    assert "../compare/table.json" in told and (path.parent / "compare" / "table.json").is_file()
    assert [line.split()[0] for line in told.splitlines()[1:3]] == ["a", "b"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "is not a run's folder: it has no config.yaml"),
        ({"config.yaml": "seed: 0\n"}, "has no finished round yet"),
        ({"config.yaml": "sed: 0\n"}, "does not describe a run of this version: there is no field"),
        (
            {"config.yaml": "seed: 0\n", "metrics.jsonl": "{}\n"},
            "does not hold the rounds of a run: ",
        ),
        (
            {"config.yaml": "seed: 0\n", "metrics.jsonl": "1 2\n"},
            "does not hold the rounds of a run: ",
        ),
        ({"table.json": "{}"}, "these folders have no run; give folders of runs"),
    ],
    ids=["empty", "no round", "another version", "not rounds", "not JSON", "a table"],
)
def test_what_cannot_be_compared_is_refused(
    files: dict[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert main(["compare", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_a_table_says_none_for_what_is_not_finite(tmp_path: Path) -> None:
    table = Table(rows=[{"a": [math.inf, 1]}], columns={}, figures={"x": math.nan, "y": 1 / 3})
    assert json.loads(table.write(tmp_path).read_text()) == {
        "figures": {"x": None, "y": 1 / 3},
        "rows": [{"a": [None, 1]}],
    }
    assert str(table).splitlines()[-1] == "y  0.3333"
    assert set(COLUMNS) >= {"run", "client memory"}


def test_a_table_says_what_is_not_compared_like_with_like(leave: Leave) -> None:
    longer = replace(SYNC, data=DataSpec(sequence_length=64))
    paths = [leave("a", SYNC, [3.0]), leave("b", longer, [3.0, 2.0])]
    text = str(Table(rows=rows_of(grouped(read_runs(paths))), columns=COLUMNS))
    assert "client steps" in text.splitlines()[0]
    assert "different data, tasks or tokenizers: data.sequence_length differ" in text
    assert "the rows differ in what was trained: client steps and tokens" in text
    alike = [leave("c", SYNC, [3.0]), leave("d", ASYNC, [3.0])]
    text = str(Table(rows=rows_of(grouped(read_runs(alike))), columns=COLUMNS))
    assert "differ" not in text


def test_curves_that_lie_on_each_other_differ_in_dashes_and_markers(leave: Leave) -> None:
    groups = grouped(read_runs([leave("a", SYNC, [3.0, 2.0]), leave("b", ASYNC, [3.0, 2.0])]))
    panel = Figure().subplots()
    for number, group in enumerate(groups):
        draw_group(panel, group, "round", number)
    first, second = panel.get_lines()
    assert first.get_linestyle() != second.get_linestyle()
    assert first.get_marker() != second.get_marker()
