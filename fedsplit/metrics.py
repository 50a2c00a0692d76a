"""What is measured in a run: one record a round, kept as JSON lines, and how it is printed."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStats:
    """One round of a federation.

    `loss` is the training loss and `eval_loss` the held-out one, in nats per token;
    `bits_per_byte` is the held-out loss per UTF-8 byte of text. `tokens` were trained on in
    `seconds`. `bytes_up` and `bytes_down` crossed the stream between clients and trunk,
    `halves_bytes` are the bottoms and tops that Flower carried, both ways. `clients` replied in
    the round, of them `late` had steps that came too late and were repeated; `failed` did not
    reply. `version` is the trunk's at the end of the round.
    """

    round: int
    rounds: int
    loss: float
    eval_loss: float
    bits_per_byte: float
    tokens: int
    seconds: float
    bytes_up: int
    bytes_down: int
    halves_bytes: int
    clients: int
    late: int
    failed: int
    version: int

    @property
    def line(self) -> str:
        """The round in one line."""
        return (
            f"round {self.round:>3}/{self.rounds}  loss {self.loss:.4f}  "
            f"held-out {self.bits_per_byte:.4f} bits/byte  "
            f"{self.tokens / max(self.seconds, 1e-9):>7.0f} tokens/s  "
            f"up {in_mib(self.bytes_up)}  down {in_mib(self.bytes_down)}  "
            f"clients {self.clients} in, {self.late} late, {self.failed} failed"
        )


def in_mib(num_bytes: int) -> str:
    """A number of bytes as text in MiB.

    >>> in_mib(3 << 20)
    '3.0 MiB'
    """
    return f"{num_bytes / 2**20:.1f} MiB"


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Summed loss in nats over text of `num_bytes` UTF-8 bytes, in bits per byte.

    >>> round(bits_per_byte(math.log(2) * 8, 4), 6)
    2.0
    """
    return nats / math.log(2) / max(1, num_bytes)


def append(path: Path, stats: RoundStats) -> None:
    """Add one round to a file of JSON lines; a number that is not finite is null there."""
    told = {key: value if math.isfinite(value) else None for key, value in asdict(stats).items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(told, allow_nan=False) + "\n")


def parse(lines: Iterable[str]) -> list[RoundStats]:
    """The rounds in JSON lines that `append` wrote."""
    told: list[dict[str, Any]] = [json.loads(line) for line in lines if line.strip()]
    for one in told:
        one.update({key: math.nan for key, value in one.items() if value is None})
    return [RoundStats(**one) for one in told]


def closing_table(rounds: Sequence[RoundStats]) -> str:
    """What a run came to: first, best and last held-out bits per byte, and the totals."""
    first, last = rounds[0], rounds[-1]
    best = min(rounds, key=lambda stats: stats.bits_per_byte)
    seconds = sum(stats.seconds for stats in rounds)
    tokens = sum(stats.tokens for stats in rounds)
    rows = [
        ("rounds", f"{len(rounds)} of {last.rounds}, {last.version} trunk steps"),
        ("held-out bits/byte, round 1", f"{first.bits_per_byte:.4f}"),
        ("held-out bits/byte, last", f"{last.bits_per_byte:.4f}"),
        ("held-out bits/byte, best", f"{best.bits_per_byte:.4f} (round {best.round})"),
        ("tokens trained on", f"{tokens:,} in {seconds:.1f} s"),
        ("activations and gradients up", in_mib(sum(stats.bytes_up for stats in rounds))),
        ("activations and gradients down", in_mib(sum(stats.bytes_down for stats in rounds))),
        ("halves through Flower", in_mib(sum(stats.halves_bytes for stats in rounds))),
        ("late, failed", f"{sum(s.late for s in rounds)}, {sum(s.failed for s in rounds)}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
