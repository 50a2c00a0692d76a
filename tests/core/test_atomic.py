"""Atomic writes: complete or not there, whatever ends the writer, and what a killed one leaves."""

import errno
import os
from pathlib import Path

import pytest

from fedsplit import atomic
from fedsplit.errors import StorageError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_folder(path: Path, text: str) -> None:
    with atomic.new_folder(path) as unfinished:
        (unfinished / "deep").mkdir()
        (unfinished / "deep" / "file").write_text(text)


def test_a_folder_replaces_the_one_before(tmp_path):
    for text in ("old", "new"):
        write_folder(tmp_path / "place" / "model", text)
    assert names(tmp_path / "place") == ["model"]
    assert (tmp_path / "place" / "model" / "deep" / "file").read_text() == "new"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (ValueError("I/O error: File too large\n(os error 27)"), r"File too large \(os error 27\)"),
    ],
    ids=["Python", "Rust"],
)
def test_a_storage_that_fails_is_reported_and_what_was_there_stays(tmp_path, error, reason):
    write_folder(tmp_path / "model", "old")
    atomic.write_text(tmp_path / "file", "old")
    with pytest.raises(StorageError, match=f"model cannot be written: .*{reason}; what was there"):
        with atomic.new_folder(tmp_path / "model") as unfinished:
            (unfinished / "half").write_text("new")
            raise error
    with pytest.raises(StorageError, match=f"file cannot be written: .*{reason}"):
        with atomic.new_file(tmp_path / "file") as unfinished:
            unfinished.write_text("ne")
            raise error
    assert names(tmp_path) == ["file", "model"] and names(tmp_path / "model") == ["deep"]
    assert (tmp_path / "file").read_text() == "old"


def test_another_error_is_passed_on(tmp_path):
    with pytest.raises(KeyError), atomic.new_folder(tmp_path / "model"):
        raise KeyError("ours")
    assert names(tmp_path) == []


def test_a_folder_is_made_once_and_not_below_a_file(tmp_path):
    folder = tmp_path / "runs" / "one"
    assert [atomic.make_folder(folder) for _ in range(2)] == [True, False]
    atomic.write_text(folder / "file", "text")
    with pytest.raises(StorageError, match="file/two cannot be written: Not a directory"):
        atomic.make_folder(folder / "file" / "two")


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    """So is a device: as root, a rename would take /dev/full away from all programs."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # Opened for both, so that neither end waits for the other.
    with open(pipe, "r+b", buffering=0) as reader:
        atomic.write_text(pipe, "text")
        assert reader.read(4) == b"text"
    assert pipe.is_fifo()
    assert names(tmp_path) == ["pipe"]


def test_what_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "lines").mkdir()
    with pytest.raises(StorageError, match="lines cannot be written: Is a directory"):
        atomic.append_line(tmp_path / "lines", "a line")
    path = tmp_path / "file" / "below"
    path.parent.write_text("no folder")
    for write in (
        lambda: atomic.write_text(path, "text"),
        lambda: write_folder(path, "text"),
        lambda: atomic.append_line(path, "a line"),
        lambda: atomic.create(path, "text"),
    ):
        with pytest.raises(StorageError, match="file/below cannot be written: Not a directory"):
            write()


def test_a_folder_that_was_about_to_be_replaced_is_put_back(tmp_path):
    write_folder(tmp_path / "round-0002", "old")
    (tmp_path / "round-0002").rename(tmp_path / ".replaced-round-0002")  # and here it was killed
    (tmp_path / ".unfinished-round-0002").mkdir()
    (tmp_path / ".unfinished-metrics.jsonl").write_text("half")
    (tmp_path / ".removed-round-0001").mkdir()
    atomic.recover(tmp_path)
    assert names(tmp_path) == ["round-0002"]
    assert (tmp_path / "round-0002" / "deep" / "file").read_text() == "old"


def test_a_folder_that_cannot_be_replaced_stays(tmp_path):
    write_folder(tmp_path / "model", "old")
    with pytest.raises(StorageError, match="model cannot be written: No such file or directory"):
        with atomic.new_folder(tmp_path / "model") as unfinished:
            unfinished.rename(tmp_path / "away")  # so the last rename fails
    assert names(tmp_path) == ["away", "model"]
    assert (tmp_path / "model" / "deep" / "file").read_text() == "old"


def test_a_folder_that_was_replaced_is_removed(tmp_path):
    write_folder(tmp_path / "round-0002", "new")
    (tmp_path / ".replaced-round-0002").mkdir()
    atomic.recover(tmp_path)
    assert names(tmp_path) == ["round-0002"]


def test_a_file_is_created_once(tmp_path):
    assert atomic.create(tmp_path / "run.json", "first")
    assert not atomic.create(tmp_path / "run.json", "second")
    assert (tmp_path / "run.json").read_text() == "first"


def test_removing_what_is_not_there_does_nothing(tmp_path):
    atomic.remove(tmp_path / "best")
    assert names(tmp_path) == []


def test_a_line_is_added_once_there_is_room(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    file.symlink_to("/dev/full")
    waits = []

    def make_room(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            file.unlink()

    atomic.when_there_is_room(lambda: atomic.append_line(file, "a"), 60.0, sleep=make_room)
    assert file.read_text() == "a\n" and waits == [5.0, 5.0, 5.0]
    (line,) = caplog.messages
    assert f"{file} cannot be written: No space left" in line and "up to 60 s for room" in line


def test_a_disk_that_stays_full_and_other_errors_end_the_wait(tmp_path):
    file, waits = tmp_path / "full", []
    file.symlink_to("/dev/full")
    for budget_s, path in ((12.0, file), (60.0, tmp_path)):
        with pytest.raises(StorageError, match=f"{path} cannot be written"):
            atomic.when_there_is_room(
                lambda path=path: atomic.append_line(path, "a"), budget_s, sleep=waits.append
            )
    assert waits == [5.0, 5.0]
