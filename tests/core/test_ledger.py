"""The ledger: its epsilons and bits, what counts as a release, and what outlasts a kill."""

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedsplit.client.ledger import Ledger, bits_of, epsilon
from fedsplit.errors import PrivacyBudget, StorageError
from simulations.accounting import CASES, epsilons

ROWS = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
TEXTS = [b"one", b"two"]


@pytest.mark.parametrize(("z", "releases"), CASES)
def test_epsilon_is_that_of_dp_accounting(z, releases):
    theirs, ours = epsilons(z, releases)
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_without_a_release_nothing_is_told(tmp_path: Path):
    spent = Ledger(tmp_path / "ledger.db").spent("rows")
    assert (spent.num_texts, spent.num_rows, spent.row_epsilon, spent.bits) == (0, 0, 0.0, 0.0)


def test_releases_add_for_each_text_and_repeats_do_not(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.release("rows", TEXTS, ROWS, 0.5)
    ledger.release("rows", TEXTS, ROWS, 0.5)
    once = ledger.spent("rows")
    assert (once.num_texts, once.num_rows) == (2, 8)
    assert once.row_epsilon == pytest.approx(24.382, abs=1e-3)
    assert once.sequence_epsilon == epsilon(4.0 * 4**0.5), "a text has four rows"
    assert once.bits == bits_of(0.5, 8)
    # Another epoch, in which the bottom has changed.
    ledger.release("rows", TEXTS[:1], ROWS[:1] + 1, 0.5)
    twice = ledger.spent("rows")
    assert (twice.num_texts, twice.num_rows) == (2, 12)
    assert twice.row_epsilon == pytest.approx(epsilon(4.0 * 2**0.5))
    assert twice.bits == 2 * bits_of(0.5, 8)
    # Noise of another size.
    ledger.release("rows", TEXTS[:1], ROWS[:1] + 2, 2.0)
    assert ledger.spent("rows").bits == 2 * bits_of(0.5, 8) + bits_of(2.0, 8)


def test_labels_have_a_ledger_of_their_own(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.release("labels", TEXTS, ROWS, 1.0)
    assert ledger.spent("rows").num_rows == 0
    assert ledger.spent("labels").num_rows == 8


def test_rows_and_gradients_of_a_text_add_up(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.db", budget_bits=1.5 * bits_of(0.5, 8))
    ledger.release("rows", TEXTS[:1], ROWS[:1], 0.5)
    with pytest.raises(PrivacyBudget, match="one more release of a text would tell up to 4.7 bits"):
        ledger.release("labels", TEXTS[:1], ROWS[:1], 0.5)
    ledger.release("labels", TEXTS[:1], ROWS[:1], 1.0)
    both = ledger.spent("rows").sequence_epsilon
    assert both == ledger.spent("labels").sequence_epsilon
    assert both == epsilon((4 * 4.0**2 + 4 * 2.0**2) ** 0.5)


def test_a_text_that_grows_tells_each_of_its_tokens_once(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.release_tokens("rows", b"a", 0, ROWS[:1], 0.5)  # four rows
    ledger.release_tokens("rows", b"a", 4, ROWS[1:, :1], 0.5)
    spent = ledger.spent("rows")
    assert (spent.num_texts, spent.num_rows, spent.bits) == (1, 5, bits_of(0.5, 8))
    assert spent.sequence_epsilon == epsilon(4.0 * 5**0.5)
    # Another token at a place that was taken back, as with a draft.
    ledger.release_tokens("rows", b"a", 3, ROWS[1:, 1:2], 0.5)
    again = ledger.spent("rows")
    assert again.num_rows == 6 and again.bits == 2 * bits_of(0.5, 8)


def test_a_budget_refuses_the_release_that_would_exceed_it(tmp_path: Path):
    most = 2.5 * bits_of(0.5, 8)
    ledger = Ledger(tmp_path / "ledger.db", budget_bits=most)
    ledger.release("rows", TEXTS, ROWS, 0.5)
    ledger.release("rows", TEXTS[:1], ROWS[:1] + 1, 0.5)
    with pytest.raises(PrivacyBudget, match=r"tell up to 7\.0 bits of each of its tokens"):
        ledger.release("rows", TEXTS, ROWS + 2, 0.5)
    # Neither text of the refused release is counted, and repeats are still allowed.
    assert ledger.spent("rows").num_rows == 12
    ledger.release("rows", TEXTS, ROWS, 0.5)
    ledger.release("rows", TEXTS[1:], ROWS[1:] + 2, 0.5)
    assert ledger.spent("rows").num_rows == 16


KILLED = """
import os, sys
import numpy as np
from pathlib import Path
from fedsplit.client.ledger import Ledger

ledger = Ledger(Path(sys.argv[1]))
for number in range(5):
    ledger.release("rows", [bytes([number])], np.full((1, 3, 4), number, np.float32), 1.0)
os.kill(os.getpid(), 9)
"""


def test_a_killed_process_loses_no_release(tmp_path: Path):
    file = tmp_path / "ledger.db"
    died = subprocess.run([sys.executable, "-c", KILLED, str(file)], timeout=120, check=False)
    assert died.returncode == -signal.SIGKILL
    assert Ledger(file).spent("rows").num_rows == 15


def test_a_damaged_ledger_is_refused_and_left_as_it_is(tmp_path: Path):
    file = tmp_path / "ledger.db"
    file.write_bytes(b"this is no database, but long enough for the header of one" * 10)
    before = file.read_bytes()
    with pytest.raises(StorageError, match="cannot be opened: .*; a new one would not know"):
        Ledger(file)
    assert file.read_bytes() == before


def test_a_ledger_that_cannot_be_written_stops_the_release(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.db")
    # Another process that holds the file for longer than anybody waits.
    other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    ledger._database.execute("PRAGMA busy_timeout = 50")
    with pytest.raises(StorageError, match="cannot be written: database is locked"):
        ledger.release("rows", TEXTS, ROWS, 0.5)
    other.execute("ROLLBACK")
    assert os.path.getsize(tmp_path / "ledger.db") >= 0 and ledger.spent("rows").num_rows == 0
