"""Free memory that the allocator keeps: a server gives it back."""

import subprocess
import sys

import pytest

from fedsplit.transport import server as module
from tests.core.worlds import wait_until
from tests.edge.echo import EchoService, serving

PIECES = """
import psutil
from fedsplit.transport.allocator import give_back

def mib():
    return psutil.Process().memory_info().rss / (1 << 20)

kept = [bytearray(60_000) for _ in range(4000)]  # too small to be a mapping of their own
kept = kept[::50]
before = mib()
print(give_back(), before - mib())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has malloc_trim")
def test_free_pieces_between_others_are_given_back() -> None:
    words = [sys.executable, "-c", PIECES]
    told = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout
    had_some, given = told.split()
    assert had_some == "True" and float(given) > 150


def test_a_server_gives_memory_back_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    times = []
    monkeypatch.setattr(module, "_GIVE_BACK_S", 0.0)
    monkeypatch.setattr(module, "give_back", lambda: times.append(1))
    with serving(EchoService()):
        wait_until(lambda: len(times) > 1)
