"""The ledger of a client: what was released of each of its texts, and what that tells at most.

A release is a row with Gaussian noise of `z` times the radius to which rows are clipped. One row in
place of any other moves it by at most twice the radius, so a release is a Gaussian mechanism with
`mu = 2 / z`, and releases add their squares of mu (Dong, Roth and Su 2022, "Gaussian Differential
Privacy", JRSS B). A row also tells at most as many bits as a Gaussian channel of its power
(Shannon 1948), whatever the attacker knows. The bits of releases add.
"""

import hashlib
import math
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from fedsplit import atomic
from fedsplit.errors import PrivacyBudget, StorageError

DELTA = 1e-5
"""The probability that the bound of an epsilon does not hold."""

_TABLE = """
CREATE TABLE IF NOT EXISTS releases (
    kind TEXT, example BLOB, place INTEGER, digest BLOB, num_rows INTEGER, sq_mu REAL, bits REAL,
    PRIMARY KEY (kind, example, place, digest)
) WITHOUT ROWID
"""
_ADD = "INSERT OR IGNORE INTO releases VALUES (?, ?, ?, ?, ?, ?, ?)"
_BITS = "SELECT SUM(bits) FROM releases WHERE example = ? AND place = ?"
_ALL = "SELECT COUNT(DISTINCT example), SUM(num_rows) FROM releases WHERE kind = ?"
_OF_ROWS = """
SELECT MAX(sq_mu), MAX(bits) FROM (
    SELECT SUM(sq_mu) AS sq_mu, SUM(bits) AS bits
    FROM releases WHERE kind = ? GROUP BY example, place
)
"""
_OF_TEXTS = """
SELECT MAX(sq_mu) FROM (SELECT SUM(num_rows * sq_mu) AS sq_mu FROM releases GROUP BY example)
"""
_Release = tuple[str, bytes, int, bytes, int, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What was released of some texts; the figures but `num_rows` are those of the worst text.

    Attributes:
        num_texts: The number of texts.
        num_rows: The number of rows of all texts; a repeat with the same bytes is none.
        row_epsilon: Epsilon of one row in place of any other, at `DELTA`.
        sequence_epsilon: Epsilon of all releases of a text, of every kind.
        bits: The most bits that rows tell of a token.
    """

    num_texts: int
    num_rows: int
    row_epsilon: float
    sequence_epsilon: float
    bits: float

    def __str__(self) -> str:
        """The figures in words."""
        return (
            f"{self.bits:.1f} bits/token, epsilon {self.row_epsilon:.3g} a row and "
            f"{self.sequence_epsilon:.3g} a sequence"
        )


class Ledger:
    """Counts the releases of a client in a database file, before they are sent.

    Args:
        file: The database; it outlasts the process.
        budget_bits: The most bits of a token that the rows and the gradients of its text may tell
            together (0: no bound).

    Raises:
        StorageError: The file cannot be opened.
    """

    def __init__(self, file: Path, budget_bits: float = 0.0) -> None:
        self._file, self._budget_bits = file, budget_bits
        self._lock = Lock()
        atomic.make_folder(file.parent)
        try:
            self._database = sqlite3.connect(file, check_same_thread=False)
            # A killed process loses nothing that was committed.
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute(_TABLE)
        except sqlite3.Error as exc:
            raise StorageError(
                f"the ledger {file} cannot be opened: {exc}; a new one would not know what was "
                "released before, so restore it from a copy"
            ) from exc

    def release(self, kind: str, examples: Sequence[bytes], rows_BTD: Any, z: float) -> None:
        """Count rows that are about to be sent, one whole sequence for each text.

        Args:
            kind: `rows` of hidden states, or `labels`, for rows of the gradient.
            examples: The digests of the texts.
            rows_BTD: The noisy rows as a NumPy array.
            z: The size of the noise, in radii.

        Raises:
            PrivacyBudget: A text would tell more than the budget; nothing is counted.
            StorageError: The file cannot be written.
        """
        _, T, D = rows_BTD.shape
        digests = [hashlib.sha256(rows_TD.tobytes()).digest() for rows_TD in rows_BTD]
        cost = (2.0 / z) ** 2, bits_of(z, D)
        named = zip(examples, digests, strict=True)
        self._add([(kind, example, 0, digest, T, *cost) for example, digest in named])

    def release_tokens(self, kind: str, text: bytes, place: int, rows_BTD: Any, z: float) -> None:
        """Count the next rows of a text that grows, such as one that is generated.

        Several sequences, as in beam search, count as one text.

        Args:
            kind: As in `release`.
            text: The name of the text.
            place: The number of its rows before these.
            rows_BTD: The noisy rows as a NumPy array.
            z: The size of the noise, in radii.

        Raises:
            PrivacyBudget: The text would tell more than the budget; nothing is counted.
            StorageError: The file cannot be written.
        """
        cost = (2.0 / z) ** 2, bits_of(z, rows_BTD.shape[2])
        self._add(
            [
                (kind, text, place + t, hashlib.sha256(row_D.tobytes()).digest(), 1, *cost)
                for rows_TD in rows_BTD
                for t, row_D in enumerate(rows_TD)
            ]
        )

    def _add(self, releases: Sequence[_Release]) -> None:
        try:
            with self._lock, self._database:
                self._database.executemany(_ADD, releases)
                if self._budget_bits:
                    for place in dict.fromkeys(release[1:3] for release in releases):
                        self._require_budget(place)
        except sqlite3.Error as exc:
            raise StorageError(f"the ledger {self._file} cannot be written: {exc}") from exc

    def _require_budget(self, place: tuple[bytes, int]) -> None:
        ((bits,),) = self._database.execute(_BITS, place)
        if bits > self._budget_bits:
            raise PrivacyBudget(
                f"one more release of a text would tell up to {bits:.1f} bits of each of its "
                f"tokens, and privacy.budget_bits={self._budget_bits:g} ({self._file}); end here, "
                "use more noise (privacy.z), or raise the budget"
            )

    def spent(self, kind: str) -> Spent:
        """Return what was released so far.

        Raises:
            StorageError: The file cannot be read.
        """
        queries = ((_ALL, (kind,)), (_OF_ROWS, (kind,)), (_OF_TEXTS, ()))
        try:
            with self._lock:
                found = [self._database.execute(*each).fetchone() for each in queries]
        except sqlite3.Error as exc:
            raise StorageError(f"the ledger {self._file} cannot be read: {exc}") from exc
        (texts, rows), (sq_mu, bits), (sequence_sq_mu,) = found
        return Spent(
            num_texts=texts,
            num_rows=rows or 0,
            row_epsilon=epsilon(math.sqrt(sq_mu or 0.0)),
            sequence_epsilon=epsilon(math.sqrt(sequence_sq_mu or 0.0)),
            bits=bits or 0.0,
        )

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def bits_of(z: float, hidden_size: int) -> float:
    """Return the most bits that a release of one row tells.

    >>> round(bits_of(0.5, 128), 2)
    2.84

    Args:
        z: The size of the noise on each coordinate, in radii of the rows.
        hidden_size: The number of coordinates.
    """
    return hidden_size / 2 * math.log2(1 + 1 / (hidden_size * z**2))


def epsilon(mu: float, delta: float = DELTA) -> float:
    """Return epsilon of a Gaussian mechanism (Balle and Wang 2018, ICML, theorem 8).

    >>> round(epsilon(2.0), 3), round(epsilon(8.0), 3)
    (9.997, 65.319)

    Args:
        mu: The most that one record moves the result, in standard deviations of the noise.
        delta: The probability that the bound does not hold.
    """
    if _delta(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while _delta(high, mu) > delta:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _delta(middle, mu) > delta else (low, middle)
    return high


def _delta(eps: float, mu: float) -> float:
    if not mu:
        return 0.0
    above, below = torch.tensor([mu / 2 - eps / mu, -mu / 2 - eps / mu], dtype=torch.float64)
    log_ndtr = torch.special.log_ndtr
    # The second summand as a whole: the first of its factors may be infinite.
    return float(log_ndtr(above).exp() - (eps + log_ndtr(below)).exp())
