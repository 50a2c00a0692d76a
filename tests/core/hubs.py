"""A hub on this machine that has the files of one model."""

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

COMMIT = "0" * 40


def hub_of(
    files: Path, before: Callable[[str], None] = lambda path: None
) -> type[BaseHTTPRequestHandler]:
    """The handler of a hub whose models all have these files.

    Args:
        files: The folder of the files.
        before: Called with the path of a download before it is answered.
    """

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(b"")

        def do_GET(self) -> None:
            before(self.path)
            self.answer(self.file.read_bytes() if self.file.is_file() else b"")

        @property
        def file(self) -> Path:
            return files / self.path.rpartition("/")[2]

        def answer(self, body: bytes) -> None:
            found = "/resolve/" in self.path and self.file.is_file()
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(self.file.stat().st_size if found else 0))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", self.file.name)
            if not found:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            self.wfile.write(body if found else b"")

        def log_message(self, *_: object) -> None:
            """Be quiet."""

    return Hub
