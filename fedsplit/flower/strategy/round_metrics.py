"""The metrics of one round, summed over the clients' replies into a `RoundStats`."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from fedsplit.data import TASKS
from fedsplit.errors import FedsplitError, GradExploded, NonFinite
from fedsplit.flower.records import ARRAYS, METRICS, WEIGHT, num_bytes
from fedsplit.flower.reply import content_of, peer_text
from fedsplit.runs.metrics import bits_per_byte
from fedsplit.spec import RunSpec
from fedsplit.telemetry.round import ClientStats, RoundStats
from fedsplit.trunk.norm_guard import GuardCounts

log = logging.getLogger(__name__)

Numbers = Mapping[str, float]

_OF_NUMBERS = (NonFinite, GradExploded)
_GONE = (
    ErrorCode.UNKNOWN,
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
)
"""The errors with which Flower replies for a client that does not."""
_HEAD = 60
"""The characters of an error's reason in which its class is named."""


@dataclass(slots=True, kw_only=True, eq=False)
class RoundMetrics:
    """The metrics of a round while it runs.

    `trained` and `evaluated` hold the replies' metrics with the client's name; one client's entries
    are in the order of arrival. `asked` are the clients that were sent work. `failures` hold the
    clients that failed in training and their reasons, `refused_replies` the number of replies, in
    training and evaluation, that were refused, and `clipped_replies` that of clipped ones. `broken`
    are the clients that could not train, and `unmeasured` those that could not evaluate, because
    numbers were not finite or out of proportion; `missing` are those that did not do one of it for
    another reason, and `gone` those of them of which Flower knows that. The round was repeated
    `repeats` times before. `connected` are the clients that must not leave in this round; those
    that do are missing. Sums are in the order of names, because a sum of floats depends on its
    order and the order of arrival is random.
    """

    trained: list[tuple[str, Numbers]] = field(default_factory=list)
    evaluated: list[tuple[str, Numbers]] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    refused_replies: int = 0
    clipped_replies: int = 0
    broken: set[str] = field(default_factory=set)
    unmeasured: set[str] = field(default_factory=set)
    repeats: int = 0
    missing: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    connected: Set[str] = frozenset()
    asked: set[str] = field(default_factory=set)
    arrays_bytes: int = 0

    def count_arrays(self, message: Message) -> None:
        """Count the bytes of the client weights in a message."""
        if message.has_content():
            arrays = message.content.array_records.get(ARRAYS, ArrayRecord())
            self.arrays_bytes += num_bytes(arrays)

    def problem_with(
        self,
        reply: Message,
        check: Callable[[RecordDict], RecordDict],
        client: str,
        where: str,
        broken: set[str],
    ) -> str:
        """Check a reply, and put the checked content in place of its own.

        Args:
            reply: The reply.
            check: Returns the checked content, or raises an error.
            client: The client that it is of.
            where: The round and the work, for the log.
            broken: The client is added to it if the reason are its numbers.

        Returns:
            Why the reply cannot be used; empty if it can.
        """
        if reply.has_error():
            problem = peer_text(reply.error.reason)
            # Flower puts the class of the error before its text.
            is_of_numbers = any(error.__name__ in problem[:_HEAD] for error in _OF_NUMBERS)
            (broken if is_of_numbers else self.missing).add(client)
            if reply.error.code in _GONE:
                self.gone.add(client)
            log.warning("%s: %s failed: %s", where, client, problem)
            return problem
        try:
            reply.content = check(content_of(reply))
        except FedsplitError as refusal:
            # The text quotes the reply.
            problem = peer_text(str(refusal))
            self.refused_replies += 1
            broken.add(client)
            code = refusal.code
            told = {"error.code": code}
            log.warning("%s: %s is refused (%s): %s", where, client, code, problem, extra=told)
            return problem
        return ""

    def stats(
        self,
        run: RunSpec,
        number: int,
        *,
        seconds: float,
        virtual_seconds: float,
        version: int,
        short_steps: int,
        guard_counts: GuardCounts,
        went_back_from: int,
        weights_epsilon: float,
    ) -> RoundStats:
        """Return the round's record."""
        trained, evaluated = _by_name(self.trained), _by_name(self.evaluated)
        tokens, held_out = int(_sum(trained, WEIGHT)), _sum(evaluated, WEIGHT)
        nats, num_bytes = _sum(evaluated, "nats"), int(_sum(evaluated, "bytes"))
        has_accuracy = TASKS[run.task].has_accuracy
        nan = math.nan
        return RoundStats(
            round=number,
            rounds=run.train.rounds,
            loss=sum(n["loss"] * n[WEIGHT] for n in trained) / tokens if tokens else nan,
            eval_loss=nats / held_out if held_out else nan,
            bits_per_byte=bits_per_byte(nats, num_bytes) if num_bytes else nan,
            accuracy=_sum(evaluated, "correct") / held_out if has_accuracy and held_out else nan,
            tokens=tokens,
            seconds=seconds,
            virtual_seconds=virtual_seconds,
            bytes_up=int(_sum(trained, "bytes-up") + _sum(evaluated, "bytes-up")),
            bytes_down=int(_sum(trained, "bytes-down") + _sum(evaluated, "bytes-down")),
            client_weights_bytes=self.arrays_bytes,
            clients=len(trained),
            late=sum(numbers["repeated"] > 0 for numbers in trained),
            failed=len(self.failures),
            version=version,
            short_steps=short_steps,
            clipped_gradients=guard_counts.clipped,
            refused_gradients=guard_counts.refused,
            quarantines=guard_counts.quarantines,
            steps=int(_sum(trained, "steps")),
            refused=int(_sum(trained, "refused")),
            refused_replies=self.refused_replies,
            clipped_replies=self.clipped_replies,
            went_back_from=went_back_from,
            repeats=self.repeats,
            client_bytes=int(max((n["peak-bytes"] for n in trained), default=0)),
            row_epsilon=_most(trained + evaluated, "row-epsilon"),
            sequence_epsilon=_most(trained + evaluated, "sequence-epsilon"),
            bits=_most(trained + evaluated, "bits"),
            label_bits=_most(trained + evaluated, "label-bits"),
            weights_epsilon=weights_epsilon,
            by_client=self._by_client(),
        )

    def _by_client(self) -> dict[str, ClientStats]:
        """Return what each client contributed in training, in the order of names."""
        failures = Counter(client for client, _ in self.failures)
        names = sorted({client for client, _ in self.trained} | failures.keys())
        return {
            name: _client_stats([n for client, n in self.trained if client == name], failures[name])
            for name in names
        }


def numbers_of(reply: Message) -> Numbers:
    """Return the metrics of a reply that are single numbers, not lists."""
    found = reply.content.metric_records.get(METRICS, MetricRecord())
    return {key: float(value) for key, value in found.items() if isinstance(value, int | float)}


def _by_name(entries: list[tuple[str, Numbers]]) -> list[Numbers]:
    return [numbers for _, numbers in sorted(entries, key=lambda entry: entry[0])]


def _client_stats(trained: list[Numbers], failed: int) -> ClientStats:
    tokens = int(_sum(trained, WEIGHT))
    return ClientStats(
        loss=sum(n["loss"] * n[WEIGHT] for n in trained) / tokens if tokens else math.nan,
        tokens=tokens,
        steps=int(_sum(trained, "steps")),
        repeated=int(_sum(trained, "repeated")),
        refused=int(_sum(trained, "refused")),
        failed=failed,
        bytes_up=int(_sum(trained, "bytes-up")),
        bytes_down=int(_sum(trained, "bytes-down")),
        own_data=bool(_most(trained, "own-data")),
    )


def _most(metrics: list[Numbers], key: str) -> float:
    return max((numbers[key] for numbers in metrics), default=0.0)


def _sum(metrics: list[Numbers], key: str) -> float:
    return sum(numbers[key] for numbers in metrics)
