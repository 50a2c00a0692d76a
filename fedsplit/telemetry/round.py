"""The record of a round: its numbers, its line of JSON, and its printed line."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientStats:
    """What one client contributed to a round, in training.

    Attributes:
        loss: Its training loss, in nats per token; NaN if no reply of it counted.
        tokens: The tokens (examples of a classifier) that it trained on.
        steps: Its optimizer steps.
        repeated: The attempts at steps that failed and were repeated, because they were late.
        refused: The steps that the trunk refused at every attempt.
        failed: The times that it did not reply, or that its reply was refused.
        bytes_up: Bytes of the stream from it to the trunk.
        bytes_down: Bytes of the stream from the trunk to it.
        own_data: Whether it trained on data of its own machine, and not on a share of the run's.
    """

    loss: float = math.nan
    tokens: int = 0
    steps: int = 0
    repeated: int = 0
    refused: int = 0
    failed: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    own_data: bool = False


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
        by_client: What each client contributed, by its name.
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
    by_client: Mapping[str, ClientStats] = field(default_factory=dict, hash=False)

    @property
    def numbers(self) -> dict[str, float]:
        """The numbers that were measured, by name, for trackers."""
        values = ((each.name, getattr(self, each.name)) for each in fields(self))
        return {n: v for n, v in values if isinstance(v, int | float) and math.isfinite(v)}

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


def line_of(stats: RoundStats) -> str:
    """Return a round as a line of JSON; a number that is not finite becomes null."""
    return json.dumps(plain(asdict(stats)), allow_nan=False)


def plain(value: Any) -> Any:
    """Return a value for JSON: in place of a number that is not finite, it has None."""
    # JSON has no NaN, and other programs cannot read what Python would write for it.
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_round(values: Mapping[str, Any]) -> bool:
    """Return whether the values of a line are those of a round, and not of a step."""
    return "step" not in values


def parse(lines: Iterable[str]) -> list[RoundStats]:
    """Return the rounds of lines that `line_of` wrote; lines of steps are left out."""
    found: list[dict[str, Any]] = [json.loads(line) for line in lines if line.strip()]
    return [_round_of(values) for values in found if is_round(values)]


def _round_of(values: dict[str, Any]) -> RoundStats:
    # The name in runs of the last release.
    if "halves_bytes" in values:
        values["client_weights_bytes"] = values.pop("halves_bytes")
    clients = dict(values.pop("by_client", {}))
    return RoundStats(
        **_with_nan(values),
        by_client={name: ClientStats(**_with_nan(one)) for name, one in clients.items()},
    )


def _with_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in dict(values).items()}
