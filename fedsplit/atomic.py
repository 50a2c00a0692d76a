"""Atomic writes: a file or a folder appears under its name complete and durable, or not at all.

Content is written beside its place as `.unfinished-NAME`, synced to the disk, and then renamed. A
folder that is replaced or removed is first renamed too, so no reader finds half of one.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedsplit.errors import StorageError

_UNFINISHED, _REPLACED, _REMOVED = ".unfinished-", ".replaced-", ".removed-"


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; the file that the block writes there becomes `path`.

    Raises:
        StorageError: The file cannot be written; what was at `path` is unchanged.
    """
    unfinished = _beside(path, _UNFINISHED)
    with _writing(path, unfinished):
        yield unfinished
        _sync(unfinished)
        unfinished.replace(path)
        _sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder; it becomes `path` at the end of the block.

    Raises:
        StorageError: The folder cannot be written; what was at `path` is unchanged.
    """
    unfinished, replaced = _beside(path, _UNFINISHED), _beside(path, _REPLACED)
    with _writing(path, unfinished):
        _discard(unfinished)
        unfinished.mkdir(parents=True)
        yield unfinished
        for written in unfinished.rglob("*"):
            _sync(written)
        _sync(unfinished)
        if path.exists():  # a folder that is not empty cannot be replaced in one operation
            _discard(replaced)
            path.rename(replaced)
        unfinished.rename(path)
        _sync(path.parent)
    _discard(replaced)


def write_text(path: Path, text: str) -> None:
    """Write a text file in place of what was there.

    Raises:
        StorageError: The file cannot be written; what was there is unchanged.
    """
    with new_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def create(path: Path, text: str) -> bool:
    """Create a text file; False if there is one already. A kill may leave it empty.

    Raises:
        StorageError: The file cannot be written.
    """
    with _writing(path):
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            return False
    return True


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file; a reader has to ignore a last line that has no end.

    Raises:
        StorageError: The line cannot be written.
    """
    with _writing(path), path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
        file.flush()
        os.fsync(file.fileno())


def remove(folder: Path) -> None:
    """Remove a folder, if it is there; no reader finds it half empty under its name."""
    removed = _beside(folder, _REMOVED)
    _discard(removed)
    if folder.exists():
        folder.rename(removed)
        _discard(removed)


def recover(folder: Path) -> None:
    """Undo what a killed process left unfinished in a folder that no other process writes to."""
    for replaced in folder.glob(f"{_REPLACED}*"):
        place = folder / replaced.name.removeprefix(_REPLACED)
        if not place.exists():
            replaced.rename(place)
    for prefix in (_UNFINISHED, _REPLACED, _REMOVED):
        for left in folder.glob(f"{prefix}*"):
            _discard(left)


@contextmanager
def _writing(path: Path, unfinished: Path | None = None) -> Iterator[None]:
    """A block that writes `path`; an exception in it removes `unfinished`."""
    try:
        yield
    except BaseException as error:
        if unfinished:
            _discard(unfinished)
        # Libraries in Rust raise types of their own, with the text of Rust's I/O errors in them.
        if isinstance(error, OSError) or "(os error " in str(error):
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            raise StorageError(
                f"{path} cannot be written: {' '.join(reason.split())}; what was there is "
                "unchanged. Make room or change the permissions, and start again (resume=auto "
                "goes on with a run that has train.save_every)"
            ) from error
        raise


def _beside(path: Path, prefix: str) -> Path:
    return path.with_name(f"{prefix}{path.name}")


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
