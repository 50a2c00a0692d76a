"""A client's checkpoints: each run has its own by its id, and old ones are removed and reported."""

import os
import shutil
from dataclasses import replace

import pytest

from fedsplit.errors import CheckpointError, ConfigError
from fedsplit.flower.node import ACTIVE_S, KEPT_RUNS, Node, remove_old_runs
from fedsplit.runs.folder import RunFolder, new_run_id
from fedsplit.spec import RunSpec
from tests.edge.federation import federate, joined, spec_for, without_seconds
from tests.edge.resuming import folder_of, interrupted, resumed

DAY_S = 86_400.0
NODE = Node(
    partition=0,
    partitions=1,
    data_path="",
    device="cpu",
    tls_ca="",
    state_dir="kept",
    trunk_address="",
    trusts_runs=True,
)


@pytest.mark.slow
def test_a_second_run_of_the_name_leaves_the_first_what_it_needs(tmp_path):
    run = spec_for(tmp_path, "clients=2", "train.rounds=3", "train.save_every=1")
    first = interrupted(run, 2)
    second = federate(run)  # its clients use the same state folder
    assert second.path.name == "tiny-2" and second.id != first.id
    again = resumed(run)
    assert again.path == first.path.resolve() and again.id == first.id
    assert without_seconds(again.rounds()) == without_seconds(second.rounds())
    weights = joined(second)
    assert all(tensor.equal(weights[name]) for name, tensor in joined(again).items())
    assert {p.name for p in (folder_of(run).path / "clients/client-0").iterdir()} == {
        first.id,
        second.id,
    }


def test_old_runs_are_removed_and_reported(tmp_path, caplog):
    ids, now = [new_run_id() for _ in range(KEPT_RUNS + 3)], 1e9
    ages = [0.0, 1.0, 6.9, 6.95, 7.1, 400.0]  # days
    for run_id, days in zip(ids, ages, strict=True):
        (tmp_path / run_id / "round-0001").mkdir(parents=True)
        os.utime(tmp_path / run_id, (now - days * DAY_S, now - days * DAY_S))
    (tmp_path / "round-0001").mkdir()  # not a run's
    remove_old_runs(tmp_path, now)
    assert ACTIVE_S == 7 * DAY_S
    assert {p.name for p in tmp_path.iterdir()} == {*ids[:4], "round-0001"}
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert f"Remove {tmp_path / ids[5]}: the run was last active 400 days ago" in caplog.text


def test_the_newest_runs_are_kept_however_old_they_are(tmp_path):
    for run_id in [new_run_id() for _ in range(KEPT_RUNS)]:
        (tmp_path / run_id).mkdir()
    remove_old_runs(tmp_path, 4e9)
    assert len(list(tmp_path.iterdir())) == KEPT_RUNS


@pytest.mark.parametrize("run_id", ["", "..", "../../x", "0123456789ABCDEF", "0" * 17])
def test_an_id_that_is_no_run_s_is_refused(run_id):
    with pytest.raises(ConfigError, match="an id is 16 hex digits"):
        NODE.checkpoints_of(RunSpec(), run_id)


def test_a_folder_without_an_id_cannot_be_resumed(tmp_path):
    run = spec_for(tmp_path, "clients=1", "train.rounds=2", "train.save_every=1")
    folder = interrupted(run, 2)
    (folder.path / "run.json").unlink()
    with pytest.raises(CheckpointError, match=r"run.json has no run id"):
        resumed(run)
    shutil.rmtree(folder.path)
    assert RunFolder.to_resume(replace(run, resume="auto")) is None
