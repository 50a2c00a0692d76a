"""The files of a corpus: which ones there are, and their text."""

import io
import logging
import os
import stat
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from fedsplit.errors import DataError

log = logging.getLogger(__name__)


def existing(path: str, kind: str, needs: str) -> Path:
    """Return `data.path` as a path.

    Args:
        path: The setting; `~` stands for the home directory, which no shell expands in it.
        kind: The kind of the data, for the error.
        needs: The kinds of paths that are allowed, for the error.

    Raises:
        DataError: There is nothing at the path, or neither a file nor a directory.
    """
    try:
        found = Path(path).expanduser()
        mode = found.stat().st_mode
    # A null character raises ValueError, and a home that does not exist RuntimeError.
    except (FileNotFoundError, NotADirectoryError, ValueError, RuntimeError) as exc:
        raise DataError(
            f"data.path={path} does not exist (looked from {Path.cwd()}); data={kind} needs {needs}"
        ) from exc
    except OSError as exc:
        raise _unreadable(found, exc) from exc
    # To open a pipe can take forever, and a device may have no end.
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise DataError(
            f"data.path={path} is a pipe, a socket or a device; data={kind} needs {needs}"
        )
    return found


def files_under(root: Path) -> list[Path]:
    """Return the files in a directory and those below it, sorted, without hidden ones.

    Links to files and directories are followed. Each directory is read once, under its own name if
    it lies below `root`; other links to it are skipped, and the log says so.

    Raises:
        DataError: A directory cannot be read.
    """
    # The order of directory entries differs between file systems.
    return sorted(_walk(root), key=Path.as_posix)


def _walk(root: Path) -> Iterator[Path]:
    seen, left = dict[tuple[int, int], Path](), deque([root])
    while left:
        folder = left.popleft()
        status = folder.stat()
        first = seen.setdefault((status.st_dev, status.st_ino), folder)
        if first != folder:
            log.warning("Skip %s: it is a link to %s, which is read already", folder, first)
            continue
        try:
            entries = sorted(folder.iterdir())
        except OSError as exc:
            raise _unreadable(folder, exc) from exc
        for path in entries:
            if path.name.startswith("."):
                continue
            if path.is_dir():
                # Links come last, so that a directory is read under its own name.
                (left.append if path.is_symlink() else left.appendleft)(path)
            elif path.is_file():
                yield path
            else:
                log.warning(
                    "Skip %s: it is neither a file nor a directory, nor a link to one", path
                )


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        DataError: It cannot be read, does not fit into memory, or is not UTF-8 text.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            # Some files of the operating system have no end, and their size is 0.
            data = file.read(size + 1)
        if len(data) > size:
            raise DataError(
                f"{path} has more bytes than its size, {size}; copy it to a file that does not "
                "change"
            )
        # Without the -sig, a byte order mark would be part of the text.
        text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()
    except MemoryError as exc:
        raise DataError(
            f"{path} has {size} bytes, which do not fit into memory; cut it into smaller files"
        ) from exc
    except UnicodeDecodeError as exc:
        raise DataError(
            f"{path} is not UTF-8 text: found byte {exc.object[exc.start]:#04x} at offset "
            f"{exc.start}; convert it, or leave it out of data.path"
        ) from exc
    except OSError as exc:
        raise _unreadable(path, exc) from exc
    # A binary file may be valid UTF-8 by chance.
    if "\0" in text:
        raise DataError(
            f"{path} is not UTF-8 text: found byte 0x00 at character {text.index(chr(0))}; "
            "convert it, or leave it out of data.path"
        )
    return text


def _unreadable(path: Path, exc: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {exc.strerror}; check its permissions")
