"""The harness's side of the hook: hears of every passage of a point, in all processes of a run."""

import json
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from simulations.faults.hook.sitecustomize import POINTS, SOCKET, VARIABLE
from simulations.faults.points import Point

HOOK = Path(__file__).parent / "hook"


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A process is at a point."""

    point: str
    pid: int


def environment(folder: Path) -> dict[str, str]:
    """Return the variables of processes that report to the watcher of a folder."""
    listed = [str(HOOK), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {VARIABLE: str(folder), "PYTHONPATH": os.pathsep.join(listed)}


@contextmanager
def watching(
    folder: Path, points: Iterable[Point], on_passage: Callable[[Passage], None]
) -> Iterator[None]:
    """Call `on_passage` for every passage inside the block, one after the other.

    A process that passes waits until the function has returned.

    Args:
        folder: Gets the list of points and the socket, whose path has at most 103 bytes.
        points: The points to hear of.
        on_passage: Called in a thread of its own.
    """
    listed = [asdict(point) for point in points]
    (folder / POINTS).write_text(json.dumps(listed), encoding="utf-8")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / SOCKET))
        listener.listen(64)
        thread = threading.Thread(target=_serve, args=(listener, on_passage), name="watcher")
        thread.start()
        try:
            yield
        finally:
            # Closing it alone does not wake `accept`.
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _serve(listener: socket.socket, on_passage: Callable[[Passage], None]) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # shut down
            return
        with connection, suppress(OSError):
            line = connection.makefile(encoding="utf-8").readline()
            if line:
                on_passage(Passage(**json.loads(line)))
