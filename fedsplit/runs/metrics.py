"""The metrics of a run: one record per round, its JSON line, and its printed form."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedsplit.console import table_text


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStats:
    """The metrics of one round; a value that was not measured is NaN.

    Attributes:
        round: The number of the round, from 1 on.
        rounds: The number of rounds of the run.
        loss: The training loss, in nats per token.
        eval_loss: The held-out loss, in nats per token.
        bits_per_byte: The held-out loss, in bits per UTF-8 byte of text.
        tokens: The tokens (examples of a classifier) that were trained on.
        seconds: The duration of the round.
        bytes_up: Bytes of the stream from the clients to the trunk.
        bytes_down: Bytes of the stream from the trunk to the clients.
        client_weights_bytes: Bytes of client weights that Flower carried, in both directions.
        clients: The number of clients that replied.
        late: The number of these clients with steps that were late and repeated.
        failed: The number of clients that did not reply.
        version: The trunk's parameter version at the end of the round.
        accuracy: The held-out accuracy of a classifier.
        steps: The optimizer steps of all clients.
        refused: The steps that the trunk refused.
        short_steps: The steps of the trunk without a client that was awaited, because the client
            had not contributed within `policy.deadline_s`.
        clipped_gradients: The clients' gradients that the guard of the trunk clipped.
        refused_gradients: Those that it refused: NaN, Inf, and those out of proportion.
        quarantines: The times that the trunk excluded a client, because several of its gradients
            in a row were refused.
        refused_replies: The number of replies, in training and evaluation, that were refused
            because a number or an array of them was impossible.
        clipped_replies: The replies whose change of the client weights the guard clipped.
        went_back_from: The round that diverged, if training went back from it to the round before
            this one, and continues at half the learning rate.
        repeats: The times that the round was trained before, without a client that was missing
            (`policy.missing=wait`).
        virtual_seconds: The duration on the virtual clock, if machines are simulated.
        client_bytes: The largest memory of one client for weights, gradients, moments and
            activations.
        row_epsilon, sequence_epsilon: With `privacy`, epsilon at delta 1e-5 of one noisy row, and
            of all rows of a text, over all releases; of the worst text of any client.
        bits: The most bits that these rows tell of a token.
        label_bits: The most bits that gradients tell of a label.
        weights_epsilon: With an accountant of the client weights, its epsilon of all rounds so far.
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
    client_weights_bytes: int
    clients: int
    late: int
    failed: int
    version: int
    accuracy: float = math.nan
    steps: int = 0
    refused: int = 0
    short_steps: int = 0
    clipped_gradients: int = 0
    refused_gradients: int = 0
    quarantines: int = 0
    refused_replies: int = 0
    clipped_replies: int = 0
    went_back_from: int = 0
    repeats: int = 0
    virtual_seconds: float = math.nan
    client_bytes: int = 0
    row_epsilon: float = 0.0
    sequence_epsilon: float = 0.0
    bits: float = 0.0
    label_bits: float = 0.0
    weights_epsilon: float = 0.0

    @property
    def line(self) -> str:
        """The round as one printed line."""
        virtual = (
            "" if math.isnan(self.virtual_seconds) else f"  {self.virtual_seconds:.0f} s virtual"
        )
        told = f"told {self.told}  " if self.bits else ""
        if self.weights_epsilon:
            told += f"weights epsilon {self.weights_epsilon:.3g}  "
        return (
            f"round {self.round:>3}/{self.rounds}  loss {self.loss:.4f}  {self.held_out}  "
            f"{self.tokens / max(self.seconds, 1e-9):>7.0f} {self.unit}/s{virtual}  "
            f"up {in_mib(self.bytes_up)}  down {in_mib(self.bytes_down)}  "
            f"{told}clients {self.clients} in, {self.late} late, {self.failed} failed"
            f"{self._troubles}"
        )

    @property
    def told(self) -> str:
        """What noisy rows and gradients have told the server of a text so far, at most."""
        return (
            f"{self.bits:.1f} bits/token, {self.label_bits:.1f} bits/label, epsilon "
            f"{self.row_epsilon:.3g} a row and {self.sequence_epsilon:.3g} a sequence"
        )

    @property
    def _troubles(self) -> str:
        # Only where there are some: they are rare, and the line is long.
        found = {
            "refused": self.refused_replies,
            "clipped": self.clipped_replies,
            "steps without a client": self.short_steps,
            "gradients clipped": self.clipped_gradients,
            "gradients refused": self.refused_gradients,
            "in quarantine": self.quarantines,
            "repetitions": self.repeats,
        }
        troubles = [f"{count} {what}" for what, count in found.items() if count]
        if self.went_back_from:
            troubles.append(f"went back from round {self.went_back_from}")
        return "".join(f", {trouble}" for trouble in troubles)

    @property
    def held_out(self) -> str:
        """The result of the round's evaluation, as text."""
        if math.isnan(self.eval_loss):
            return "held-out not measured"
        if math.isnan(self.accuracy):
            return f"held-out {self.bits_per_byte:.4f} bits/byte"
        return f"held-out {self.eval_loss:.4f} loss {self.accuracy:.1%} right"

    @property
    def unit(self) -> str:
        """The unit of `tokens`."""
        return "tokens" if math.isnan(self.accuracy) else "examples"


def in_mib(num_bytes: int) -> str:
    """Return a number of bytes as text in MiB.

    >>> in_mib(3 << 20)
    '3.0 MiB'
    """
    return f"{num_bytes / 2**20:.1f} MiB"


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Return a loss in bits per byte, from its sum in nats over `num_bytes` UTF-8 bytes.

    >>> round(bits_per_byte(math.log(2) * 8, 4), 6)
    2.0
    """
    return nats / math.log(2) / max(1, num_bytes)


def evaluated(rounds: Sequence[RoundStats]) -> Sequence[RoundStats]:
    """Return the rounds with a held-out result; all rounds if none has one."""
    return [stats for stats in rounds if not math.isnan(stats.eval_loss)] or rounds


def line_of(stats: RoundStats) -> str:
    """Return a round as a line of JSON; a number that is not finite becomes null."""
    # JSON has no NaN, and other programs cannot read what Python would write for it.
    values = {key: value if math.isfinite(value) else None for key, value in asdict(stats).items()}
    return json.dumps(values, allow_nan=False)


def parse(lines: Iterable[str]) -> list[RoundStats]:
    """Return the rounds of lines that `line_of` wrote."""
    rounds: list[dict[str, Any]] = [json.loads(line) for line in lines if line.strip()]
    for values in rounds:
        # The name in runs of the last release.
        if "halves_bytes" in values:
            values["client_weights_bytes"] = values.pop("halves_bytes")
        values.update({key: math.nan for key, value in values.items() if value is None})
    return [RoundStats(**values) for values in rounds]


def closing_table(
    rounds: Sequence[RoundStats], vocabulary: int = 0, sample: str | None = None
) -> str:
    """Return the table at the end of a run: first, best and last held-out result, and totals.

    Args:
        rounds: The run's rounds, at least one.
        vocabulary: The number of tokens of a language model. With it, the table has the result of a
            model that gives each token the same probability, as an untrained one nearly does.
        sample: The words that the trained model writes; None if it writes none.
    """
    last, measured = rounds[-1], evaluated(rounds)
    best = min(measured, key=lambda stats: stats.eval_loss)
    seconds = sum(stats.seconds for stats in rounds)
    virtual = sum(stats.virtual_seconds for stats in rounds)
    tokens = sum(stats.tokens for stats in rounds)
    steps = sum(stats.steps for stats in rounds)
    short = sum(stats.short_steps for stats in rounds)
    clipped = sum(stats.clipped_gradients for stats in rounds)
    refused = sum(stats.refused_gradients for stats in rounds)
    returns = [s for s in rounds if s.went_back_from]
    through_flower = sum(stats.client_weights_bytes for stats in rounds)
    rows = [
        (
            "rounds",
            f"{len(rounds)} of {last.rounds}, {last.version} trunk steps, {steps:,} client steps",
        ),
        *_of_guessing(measured[-1], vocabulary),
        (f"round {measured[0].round}", measured[0].held_out),
        (f"last (round {measured[-1].round})", measured[-1].held_out),
        (f"best (round {best.round})", best.held_out),
        *([("sample of its text", f'"{sample}"')] if sample is not None else []),
        (f"{measured[-1].unit} trained on", f"{tokens:,} in {seconds:.1f} s"),
        *([] if math.isnan(virtual) else [("virtual time", f"{virtual:.1f} s")]),
        ("activations and gradients up", in_mib(sum(stats.bytes_up for stats in rounds))),
        ("activations and gradients down", in_mib(sum(stats.bytes_down for stats in rounds))),
        ("client weights through Flower", in_mib(through_flower)),
        ("memory of a client", in_mib(max(stats.client_bytes for stats in rounds))),
        ("late, failed", f"{sum(s.late for s in rounds)}, {sum(s.failed for s in rounds)}"),
        *([("told the server, at most", last.told)] if last.bits else []),
        *(
            [("epsilon of the client weights", f"{last.weights_epsilon:.3g}")]
            if last.weights_epsilon
            else []
        ),
        *([("steps without a client", f"{short:,}")] if short else []),
        *(
            [("gradients clipped, refused", f"{clipped:,}, {refused:,}")]
            if clipped + refused
            else []
        ),
        *(("went back", text_of_return(each)) for each in returns),
    ]
    return table_text(rows)


def text_of_return(stats: RoundStats) -> str:
    """Return in words that training went back before this round."""
    return (
        f"round {stats.went_back_from} diverged; from round {stats.round - 1} on, half the "
        "learning rate"
    )


def _of_guessing(stats: RoundStats, vocabulary: int) -> list[tuple[str, str]]:
    # The mean loss of any model on the same tokens and bytes has the same ratio of both units.
    if vocabulary < 2 or not stats.eval_loss > 0:
        return []
    guessing = stats.bits_per_byte * math.log(vocabulary) / stats.eval_loss
    return [(f"guessing among {vocabulary:,} tokens", f"held-out {guessing:.4f} bits/byte")]
