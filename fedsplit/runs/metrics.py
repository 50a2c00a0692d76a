"""What is measured in a run: one record a round, kept as JSON lines, and how it is printed."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedsplit.console import table_text


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStats:
    """One round of a federation.

    `loss` is the training loss and `eval_loss` the held-out one, in nats per token;
    `bits_per_byte` is the held-out loss per UTF-8 byte of text. `tokens` were trained on in
    `seconds`. `bytes_up` and `bytes_down` crossed the stream between clients and trunk,
    `halves_bytes` are the bottoms and tops that Flower carried, both ways. `clients` replied in
    the round, of them `late` had steps that came too late and were repeated; `failed` did not
    reply. `version` is the trunk's at the end of the round.

    `accuracy` is the held-out one of a classifier. `steps` are the optimizer steps of all clients,
    `refused` those that the trunk would not take. `virtual_seconds` is what the round took on the
    virtual clock, where machines are simulated; `client_bytes` the most memory that one client's
    weights, gradients, moments and activations took.
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
    accuracy: float = math.nan
    steps: int = 0
    refused: int = 0
    virtual_seconds: float = math.nan
    client_bytes: int = 0

    @property
    def line(self) -> str:
        """The round in one line."""
        virtual = (
            "" if math.isnan(self.virtual_seconds) else f"  {self.virtual_seconds:.0f} s virtual"
        )
        return (
            f"round {self.round:>3}/{self.rounds}  loss {self.loss:.4f}  {self.held_out}  "
            f"{self.tokens / max(self.seconds, 1e-9):>7.0f} {self.unit}/s{virtual}  "
            f"up {in_mib(self.bytes_up)}  down {in_mib(self.bytes_down)}  "
            f"clients {self.clients} in, {self.late} late, {self.failed} failed"
        )

    @property
    def held_out(self) -> str:
        """What the round's evaluation found, in words."""
        if math.isnan(self.eval_loss):
            return "held-out not measured"
        if math.isnan(self.accuracy):
            return f"held-out {self.bits_per_byte:.4f} bits/byte"
        return f"held-out {self.eval_loss:.4f} loss {self.accuracy:.1%} right"

    @property
    def unit(self) -> str:
        """What `tokens` are."""
        return "tokens" if math.isnan(self.accuracy) else "examples"


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


def evaluated(rounds: Sequence[RoundStats]) -> Sequence[RoundStats]:
    """The rounds with a held-out result; all of them if none has one."""
    return [stats for stats in rounds if not math.isnan(stats.eval_loss)] or rounds


def line_of(stats: RoundStats) -> str:
    """One round as a line of JSON; a number that is not finite is null there."""
    told = {key: value if math.isfinite(value) else None for key, value in asdict(stats).items()}
    return json.dumps(told, allow_nan=False)


def parse(lines: Iterable[str]) -> list[RoundStats]:
    """The rounds in lines that `line_of` wrote."""
    told: list[dict[str, Any]] = [json.loads(line) for line in lines if line.strip()]
    for one in told:
        one.update({key: math.nan for key, value in one.items() if value is None})
    return [RoundStats(**one) for one in told]


def closing_table(rounds: Sequence[RoundStats]) -> str:
    """What a run came to: first, best and last held-out result, and the totals."""
    last, measured = rounds[-1], evaluated(rounds)
    best = min(measured, key=lambda stats: stats.eval_loss)
    seconds = sum(stats.seconds for stats in rounds)
    virtual = sum(stats.virtual_seconds for stats in rounds)
    tokens = sum(stats.tokens for stats in rounds)
    rows = [
        ("rounds", f"{len(rounds)} of {last.rounds}, {last.version} trunk steps"),
        (f"round {measured[0].round}", measured[0].held_out),
        (f"last (round {measured[-1].round})", measured[-1].held_out),
        (f"best (round {best.round})", best.held_out),
        (f"{measured[-1].unit} trained on", f"{tokens:,} in {seconds:.1f} s"),
        *([] if math.isnan(virtual) else [("virtual time", f"{virtual:.1f} s")]),
        ("activations and gradients up", in_mib(sum(stats.bytes_up for stats in rounds))),
        ("activations and gradients down", in_mib(sum(stats.bytes_down for stats in rounds))),
        ("client weights through Flower", in_mib(sum(stats.halves_bytes for stats in rounds))),
        ("memory of a client", in_mib(max(stats.client_bytes for stats in rounds))),
        ("late, failed", f"{sum(s.late for s in rounds)}, {sum(s.failed for s in rounds)}"),
    ]
    return table_text(rows)
