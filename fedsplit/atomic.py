"""Atomic writes: a file or a folder appears under its name complete and durable, or not at all.

Content is written as `.unfinished-NAME` in the same folder, synced to the disk, and then renamed. A
folder that is replaced or removed is renamed first too, so a reader never finds a part of it.
"""

import errno
import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeVar

from fedsplit.errors import StorageError

T = TypeVar("T")

log = logging.getLogger(__name__)

_WAIT_FOR_ROOM_S = 5.0
_UNFINISHED, _REPLACED, _REMOVED = ".unfinished-", ".replaced-", ".removed-"


@contextmanager
def writing(path: Path, unfinished: Path | None = None) -> Iterator[None]:
    """Convert errors of the block, which writes `path`; an exception removes `unfinished`.

    Raises:
        StorageError: The block had an error of the operating system.
    """
    try:
        yield
    # Also at an interrupt: Ctrl-C must not leave a temporary file.
    except BaseException as error:
        if unfinished:
            _discard(unfinished)
            # If this fails too, `recover` tries again.
            with suppress(OSError):
                _put_back(path)
        # Libraries in Rust raise their own types, which contain the text of Rust's I/O errors.
        if isinstance(error, OSError) or "(os error " in str(error):
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            raise StorageError(
                f"{path} cannot be written: {' '.join(reason.split())}; what was there is "
                "unchanged. Make room or change the permissions, and start again (resume=auto "
                "continues a run that has train.save_every)"
            ) from error
        raise


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; the file that the block writes there becomes `path`.

    A device or a pipe, such as /dev/stdout, is not replaced, and is yielded itself.

    Raises:
        StorageError: The file cannot be written; what was at `path` is unchanged.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        with writing(path):
            yield path
        return
    unfinished = _beside(path, _UNFINISHED)
    with writing(path, unfinished):
        yield unfinished
        # Content first: a rename that reaches the disk before it would leave an empty file.
        _sync(unfinished)
        unfinished.replace(path)
        _sync(path.parent)  # the name is data of the folder, and is synced with it


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder; it becomes `path` at the end of the block.

    Raises:
        StorageError: The folder cannot be written; what was at `path` is unchanged.
    """
    unfinished, replaced = _beside(path, _UNFINISHED), _beside(path, _REPLACED)
    with writing(path, unfinished):
        _discard(unfinished)  # a killed process may have left one
        unfinished.mkdir(parents=True)
        yield unfinished
        for entry in unfinished.rglob("*"):
            _sync(entry)
        _sync(unfinished)
        if path.exists():
            # No call replaces a folder with content. `recover` undoes a kill between the renames.
            _discard(replaced)
            path.rename(replaced)
        unfinished.rename(path)
        _sync(path.parent)
    _discard(replaced)


def make_folder(path: Path) -> bool:
    """Make a folder and those above it; return False if there is something of this name.

    Raises:
        StorageError: It cannot be made.
    """
    with writing(path):
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            return False
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file, and replace a file of this name.

    Raises:
        StorageError: The file cannot be written; a file of this name is unchanged.
    """
    with new_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def create(path: Path, text: str) -> bool:
    """Create a text file; return False if it exists already. A kill may leave it empty.

    Raises:
        StorageError: The file cannot be written.
    """
    with writing(path):
        try:
            # "x" makes the check and the creation one operation: of two processes one succeeds.
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            return False
    return True


def create_secret(path: Path, content: bytes) -> bool:
    """Create a file that only its owner can read; return False if there is one of this name.

    Raises:
        StorageError: The file cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Readable by its owner only.
        number, unfinished = tempfile.mkstemp(prefix=_UNFINISHED, dir=path.parent)
        try:
            with open(number, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(number)
            # Unlike a rename, a link replaces nothing: of two processes, one creates the file.
            os.link(unfinished, path)
        except FileExistsError:
            return False
        finally:
            Path(unfinished).unlink()
    _sync(path.parent)
    return True


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file. A reader must ignore a last line without a line end.

    Raises:
        StorageError: The line cannot be written; no part of it was added.
    """
    # Without a buffer, which would be written again when the file is closed.
    with writing(path), path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            left = memoryview(f"{line}\n".encode())
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):  # the first error says why
                file.truncate(end)
            raise


def when_there_is_room(
    write: Callable[[], T], budget_s: float, sleep: Callable[[float], None] = time.sleep
) -> T:
    """Call `write`, and again while the disk is full; return its result.

    Args:
        write: Writes files; it can be called again if it fails.
        budget_s: The longest time to wait, in seconds.
        sleep: Waits for a number of seconds.

    Raises:
        StorageError: The disk is still full, or the files cannot be written for another reason.
    """
    waited_s = 0.0
    while True:
        try:
            return write()
        except StorageError as exc:
            if not _is_full(exc.__cause__) or waited_s + _WAIT_FOR_ROOM_S > budget_s:
                raise
            if not waited_s:
                log.warning("%s; waiting up to %.0f s for room", exc, budget_s)
        sleep(_WAIT_FOR_ROOM_S)
        waited_s += _WAIT_FOR_ROOM_S


def _is_full(error: BaseException | None) -> bool:
    numbers = (errno.ENOSPC, errno.EDQUOT)
    # Libraries in Rust have the number in their text.
    texts = tuple(f"(os error {number})" for number in numbers)
    is_ours = isinstance(error, OSError) and error.errno in numbers
    return is_ours or any(text in str(error) for text in texts)


def lock(file: IO[str], of: Path) -> bool:
    """Lock an open file until it is closed; return False if another process has locked it.

    Some file systems have no locks. Then nothing is locked, and a warning is logged.

    Args:
        file: The file, open for writing, since NFS grants an exclusive lock for no other file.
        of: The folder that the lock is for.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as exc:
        log.warning("%s cannot be locked (%s); use it in one process at a time", of, exc)
    return True


def remove(folder: Path) -> None:
    """Remove a folder if it exists. A reader never finds a part of it under its name.

    Raises:
        StorageError: It cannot be removed.
    """
    removed = _beside(folder, _REMOVED)
    with writing(folder):
        _discard(removed)
        if folder.exists():
            folder.rename(removed)
    _discard(removed)


def recover(folder: Path) -> None:
    """Restore replaced folders and remove temporary files that a killed process has left.

    Args:
        folder: No other process may write to it now.

    Raises:
        StorageError: A replaced folder cannot be restored.
    """
    for replaced in folder.glob(f"{_REPLACED}*"):
        original = folder / replaced.name.removeprefix(_REPLACED)
        with writing(original):
            _put_back(original)
    for prefix in (_UNFINISHED, _REPLACED, _REMOVED):
        for temporary in folder.glob(f"{prefix}*"):
            _discard(temporary)


def _beside(path: Path, prefix: str) -> Path:
    return path.with_name(f"{prefix}{path.name}")


def _put_back(path: Path) -> None:
    """Restore a folder if its writer ended after the first of the two renames that replace it."""
    replaced = _beside(path, _REPLACED)
    if replaced.exists() and not path.exists():
        replaced.rename(path)


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
