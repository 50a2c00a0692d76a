"""Checkpoints are whole or not there, and are refused where settings or bytes have changed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedsplit.errors import CheckpointError, ConfigError, StorageError
from fedsplit.model.manifest import with_digest
from fedsplit.runs.checkpoint import (
    Checkpoint,
    checkpoints_in,
    prune,
    prune_states,
    remove_after,
    states_in,
)
from fedsplit.spec import RunSpec, TrainSpec
from tests.core.damage import room_for, with_flipped

RUN = RunSpec()
OWNER, GROUPS = "client-0/00000000000000aa", ("client_weights", "nothing")


def checkpoint(round: int = 3, run: RunSpec = RUN) -> Checkpoint:
    weights = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.steps": torch.tensor(7)}
    return Checkpoint(
        round=round,
        owner=OWNER,
        settings=run.settings,
        facts={"corpus": "abc"},
        tensors={"client_weights": weights, "nothing": {}},
    )


def read(path: Path, run: RunSpec = RUN) -> Checkpoint:
    return Checkpoint.read(path, run, OWNER, GROUPS)


def test_what_was_written_is_read(tmp_path):
    path = checkpoint().write(tmp_path)
    found = read(path)
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
        read(path, other)
    assert read(path, replace(RUN, name="again", resume="auto")).round == 3


def test_a_damaged_file_is_refused(tmp_path):
    path = checkpoint().write(tmp_path)
    file = path / "client_weights.safetensors"
    file.write_bytes(with_flipped(file.read_bytes(), -8))
    with pytest.raises(CheckpointError, match="client_weights.safetensors is missing or damaged"):
        read(path)
    file.unlink()
    with pytest.raises(CheckpointError, match="missing or damaged"):
        read(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", "[" * 100_000])
def test_what_is_no_snapshot_is_refused(tmp_path, text):
    path = checkpoint().write(tmp_path)
    (path / "checkpoint.json").write_text(text)
    with pytest.raises(CheckpointError, match="is no checkpoint of a run"):
        read(path)


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
    with pytest.raises(CheckpointError, match="a checkpoint of format 1, and this version reads 6"):
        read(path)


def test_a_flipped_bit_of_the_label_changes_nothing_that_is_read(tmp_path):
    path = checkpoint().write(tmp_path)
    label, found = path / "checkpoint.json", read(path)
    whole = label.read_bytes()
    # 11 has no factor in common with 8, so all bits of a byte are tried.
    for bit in range(0, len(whole) * 8, 11):
        label.write_bytes(with_flipped(whole, bit))
        try:
            again = read(path)
        except (CheckpointError, ConfigError):
            continue
        for name in ("round", "owner", "settings", "facts"):
            assert getattr(again, name) == getattr(found, name), f"bit {bit}"


def test_a_checkpoint_of_another_round_or_owner_is_refused(tmp_path):
    path = checkpoint(3).write(tmp_path)
    path = path.rename(tmp_path / "round-0002")
    text = rf"round-0002 holds round 3 of {OWNER}, but this folder is for round-0002 of {OWNER}"
    with pytest.raises(CheckpointError, match=text):
        read(path)
    path = path.rename(tmp_path / "round-0003")
    with pytest.raises(CheckpointError, match=f"round 3 of {OWNER}, .* for round-0003 of client-1"):
        Checkpoint.read(path, RUN, "client-1", GROUPS)


@pytest.mark.parametrize(
    "files", [{}, {"../../x": ""}, {"/etc/passwd": ""}], ids=["none", "above", "absolute"]
)
def test_a_label_that_names_no_files_or_foreign_ones_is_refused(tmp_path, files):
    path = checkpoint().write(tmp_path)
    label = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps(with_digest(label | {"files": files})))
    with pytest.raises(
        CheckpointError, match=r"names the files .*, but the checkpoint needs \['cl"
    ):
        read(path)


@pytest.mark.parametrize("size", [0, 10, 500])
def test_a_full_disk_is_our_error_and_the_checkpoint_before_stays(tmp_path, size):
    path = checkpoint().write(tmp_path)
    with pytest.raises(StorageError, match=f"{path} cannot be written: .*File too large"):
        with room_for(size):
            checkpoint().write(tmp_path)
    assert read(path).round == 3
    assert list(tmp_path.iterdir()) == [path]


def test_a_client_s_states_are_found_by_their_ids(tmp_path):
    for number, state in ((1, 0xB), (2, 0xA), (2, 0xC)):
        replace(checkpoint(number), state=state).write(tmp_path)
    found = states_in(tmp_path)
    assert list(found) == [0xB, 0xA, 0xC] and not checkpoints_in(tmp_path)
    assert found[0xA].name == "round-0002-000000000000000a"
    prune_states(tmp_path, {0xA, 0xD})
    assert list(states_in(tmp_path)) == [0xA]


def test_only_the_folder_s_own_name_is_a_checkpoint(tmp_path):
    path = checkpoint().write(tmp_path)
    for name in ("round-3", "round-\N{SUPERSCRIPT THREE}", "round-"):
        path.rename(tmp_path / name)
        assert not checkpoints_in(tmp_path)
        (tmp_path / name).rename(path)
