"""Checkpoints are whole or not there, and are refused where settings or bytes have changed."""

import json
from dataclasses import replace

import pytest
import torch

from fedsplit.errors import CheckpointError, ConfigError
from fedsplit.runs.checkpoint import Checkpoint, checkpoints_in, prune, remove_after
from fedsplit.spec import RunSpec, TrainSpec

RUN = RunSpec()


def checkpoint(round: int = 3, run: RunSpec = RUN) -> Checkpoint:
    weights = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.steps": torch.tensor(7)}
    return Checkpoint(
        round=round,
        settings=run.settings,
        facts={"corpus": "abc"},
        tensors={"client_weights": weights, "nothing": {}},
    )


def test_what_was_written_is_read(tmp_path):
    path = checkpoint().write(tmp_path)
    found = Checkpoint.read(path, RUN)
    assert (found.round, found.facts) == (3, {"corpus": "abc"})
    assert found.tensors.keys() == {"client_weights", "nothing"}
    assert torch.equal(found.tensors["client_weights"]["a.weight"], torch.arange(6.0).reshape(2, 3))
    assert found.tensors["client_weights"]["a.steps"] == 7
    assert not found.tensors["nothing"]


def test_a_snapshot_of_the_same_round_is_replaced(tmp_path):
    path = checkpoint().write(tmp_path)
    assert checkpoint().write(tmp_path) == path
    assert checkpoints_in(tmp_path) == {3: path}


def test_an_unfinished_one_does_not_count(tmp_path):
    done = checkpoint(1).write(tmp_path)
    (tmp_path / ".unfinished-round-0002").mkdir()
    (tmp_path / "round-0002").mkdir()
    assert checkpoints_in(tmp_path) == {1: done}


def test_other_settings_are_named(tmp_path):
    path = checkpoint().write(tmp_path)
    other = replace(RUN, seed=5, train=TrainSpec(lr=0.5))
    with pytest.raises(ConfigError, match=r"seed was 0, is 5, train.lr was 0.003, is 0.5; resume"):
        Checkpoint.read(path, other)
    assert Checkpoint.read(path, replace(RUN, name="again", resume="auto")).round == 3


def test_a_damaged_file_is_refused(tmp_path):
    path = checkpoint().write(tmp_path)
    file = path / "client_weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="client_weights.safetensors is missing or damaged"):
        Checkpoint.read(path, RUN)
    file.unlink()
    with pytest.raises(CheckpointError, match="missing or damaged"):
        Checkpoint.read(path, RUN)


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense"])
def test_what_is_no_snapshot_is_refused(tmp_path, text):
    path = checkpoint().write(tmp_path)
    (path / "checkpoint.json").write_text(text)
    with pytest.raises(CheckpointError, match="is no checkpoint of a run"):
        Checkpoint.read(path, RUN)


@pytest.mark.parametrize(
    ("oldest_needed", "left"),
    [(0, [1, 3, 5, 8]), (2, [1, 3, 5, 8]), (3, [3, 5, 8]), (7, [5, 8]), (99, [8])],
)
def test_prune_keeps_what_a_resumed_run_may_need(tmp_path, oldest_needed, left):
    for number in (1, 3, 5, 8):
        checkpoint(number).write(tmp_path)
    prune(tmp_path, oldest_needed)
    assert list(checkpoints_in(tmp_path)) == left


def test_rounds_that_are_done_again_are_removed(tmp_path):
    for number in (1, 3, 5):
        checkpoint(number).write(tmp_path)
    remove_after(tmp_path, 3)
    assert list(checkpoints_in(tmp_path)) == [1, 3]


def test_a_snapshot_of_another_format_is_refused_by_its_number(tmp_path):
    path = checkpoint().write(tmp_path)
    label = json.loads((path / "checkpoint.json").read_text())
    del label["format"]  # as the first format had none
    (path / "checkpoint.json").write_text(json.dumps(label))
    with pytest.raises(CheckpointError, match="a checkpoint of format 1, and this version reads 3"):
        Checkpoint.read(path, RUN)
