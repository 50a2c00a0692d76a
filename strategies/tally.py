"""What a round's replies come to: the numbers of one `RoundStats`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, Message, MetricRecord

from fedsplit.flower.records import ARRAYS, METRICS, WEIGHT, num_bytes
from fedsplit.runs.metrics import RoundStats, bits_per_byte
from fedsplit.spec import RunSpec

Numbers = Mapping[str, float]


@dataclass(slots=True, kw_only=True, eq=False)
class Tally:
    """The numbers of a round while it goes on.

    `trained` and `evaluated` hold the replies' metrics by client, with a client's own in the
    order in which they came, and `reasons` why others failed. Sums go by name: a sum of floats
    depends on the order, and the order in which clients answer is chance.
    """

    trained: list[tuple[str, Numbers]] = field(default_factory=list)
    evaluated: list[tuple[str, Numbers]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    halves_bytes: int = 0

    def carried(self, message: Message) -> None:
        """Count the halves in a message."""
        if message.has_content():
            arrays = message.content.array_records.get(ARRAYS, ArrayRecord())
            self.halves_bytes += num_bytes(arrays)

    def stats(
        self, run: RunSpec, number: int, *, seconds: float, virtual_seconds: float, version: int
    ) -> RoundStats:
        """The round's record."""
        trained, evaluated = _by_name(self.trained), _by_name(self.evaluated)
        tokens, held_out = int(_sum(trained, WEIGHT)), _sum(evaluated, WEIGHT)
        nats, num_bytes = _sum(evaluated, "nats"), int(_sum(evaluated, "bytes"))
        classifies = run.task.endswith("classification")
        nan = math.nan
        return RoundStats(
            round=number,
            rounds=run.train.rounds,
            loss=sum(n["loss"] * n[WEIGHT] for n in trained) / tokens if tokens else nan,
            eval_loss=nats / held_out if held_out else nan,
            bits_per_byte=bits_per_byte(nats, num_bytes) if num_bytes else nan,
            accuracy=_sum(evaluated, "correct") / held_out if classifies and held_out else nan,
            tokens=tokens,
            seconds=seconds,
            virtual_seconds=virtual_seconds,
            bytes_up=int(_sum(trained, "bytes-up") + _sum(evaluated, "bytes-up")),
            bytes_down=int(_sum(trained, "bytes-down") + _sum(evaluated, "bytes-down")),
            halves_bytes=self.halves_bytes,
            clients=len(trained),
            late=sum(numbers["repeated"] > 0 for numbers in trained),
            failed=len(self.reasons),
            version=version,
            steps=int(_sum(trained, "steps")),
            refused=int(_sum(trained, "refused")),
            client_bytes=int(max((n["peak-bytes"] for n in trained), default=0)),
        )


def numbers_of(reply: Message) -> Numbers:
    """The single numbers among a reply's metrics."""
    found = reply.content.metric_records.get(METRICS, MetricRecord())
    return {key: float(value) for key, value in found.items() if isinstance(value, int | float)}


def _by_name(entries: list[tuple[str, Numbers]]) -> list[Numbers]:
    return [numbers for _, numbers in sorted(entries, key=lambda entry: entry[0])]


def _sum(metrics: list[Numbers], key: str) -> float:
    return sum(numbers[key] for numbers in metrics)
