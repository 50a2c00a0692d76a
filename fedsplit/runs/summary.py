"""The figures of a run in words, for its report and for `fedsplit watch`.

All of them are read from the run's folder, so a run that was stopped has them too.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from fedsplit import atomic
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.metrics import evaluated, text_of_return
from fedsplit.spec import RunSpec
from fedsplit.telemetry.round import RoundStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of the headline: its name, its value with a unit, and a note about it."""

    name: str
    value: str
    unit: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTotals:
    """What one client contributed to a run, summed over its rounds.

    `loss` is its training loss in the last round that counted, in nats per token, and `share` its
    part of all tokens. `rounds` is the number of rounds to which it contributed.
    """

    name: str
    rounds: int
    steps: int
    tokens: int
    share: float
    loss: float
    repeated: int
    refused: int
    failed: int
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """Contributions that were late, refused or missing: how many, in which rounds, and why."""

    name: str
    count: int
    rounds: str
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """The bytes of one kind: of the whole run, of a round, and of a client's step (means)."""

    name: str
    total: int
    per_round: float
    per_step: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A run: its folder, its settings, its rounds, and whether it trains or how it ended.

    `is_over` is true for a run that is finished or ended early; one that was stopped can go on.
    """

    folder: RunFolder
    run: RunSpec
    rounds: Sequence[RoundStats]
    state: str
    is_over: bool

    @staticmethod
    def read(folder: RunFolder, *, is_over: bool = False) -> "Summary":
        """Return the summary of a run's folder.

        Args:
            folder: The folder.
            is_over: Whether the run is over, though its model has not its name yet.

        Raises:
            DataError: The folder is not a run's folder, or is damaged.
        """
        run, rounds = folder.run, folder.rounds()
        is_over = is_over or folder.is_finished
        state = _end_of(folder) if is_over else _state_of(folder)
        # A report is read elsewhere, and "." is no name.
        folder = RunFolder(folder.path.resolve())
        return Summary(folder=folder, run=run, rounds=rounds, state=state, is_over=is_over)

    @property
    def subtitle(self) -> str:
        """The model, the cut, the data, the clients and the method in one line."""
        run = self.run
        method = f"baseline {run.baseline}" if run.baseline != "none" else f"split {run.split}"
        return (
            f"{run.model}, {method}, {run.data.kind} corpus, {run.sharding.kind} sharding over "
            f"{counted(run.clients, 'client')}, policy {run.policy.kind}"
        )

    @property
    def unit(self) -> str:
        """The unit of what was trained on: tokens, or examples of a classifier."""
        return evaluated(self.rounds)[-1].unit

    @property
    def progress(self) -> str:
        """The number of rounds, as text."""
        done = self.rounds[-1].round if self.rounds else 0
        return f"{done} of {counted(self.run.train.rounds, 'round')}"

    @property
    def headline(self) -> list[Figure]:
        """Held-out result, bytes of a step, duration, and what the server was told at most."""
        return [self._held_out(), self._bytes(), self._duration(), self._told()]

    def _held_out(self) -> Figure:
        measured = evaluated(self.rounds)
        first, last = measured[0], measured[-1]
        if math.isnan(last.eval_loss):
            return Figure(name="Held-out loss", value="-", unit="", note="not measured")
        if not math.isnan(last.accuracy):
            note = f"{last.accuracy:.1%} right; {first.accuracy:.1%} after round {first.round}"
            value, unit = f"{last.eval_loss:.4f}", "nats"
        else:
            note = f"{last.eval_loss:.4f} nats/token; {first.bits_per_byte:.4f} bits/byte after "
            note += f"round {first.round}"
            value, unit = f"{last.bits_per_byte:.4f}", "bits/byte"
        return Figure(name="Held-out loss", value=value, unit=unit, note=note)

    def _bytes(self) -> Figure:
        up, down, weights = (each.per_step for each in self.traffic)
        value, unit = bytes_text(up + down).split()
        note = f"{bytes_text(up)} up and {bytes_text(down)} down per client step, with evaluation"
        if not up + down:
            note = f"no step crosses the network; {bytes_text(weights)} of client weights a step"
        return Figure(name="Bytes per step", value=value, unit=unit, note=note)

    def _duration(self) -> Figure:
        seconds = sum(stats.seconds for stats in self.rounds)
        virtual = sum(stats.virtual_seconds for stats in self.rounds)
        speed = sum(stats.tokens for stats in self.rounds) / max(seconds, 1e-9)
        note = f"training of {self.progress}, {speed:,.0f} {self.unit}/s"
        if not math.isnan(virtual):
            note += f"; {virtual:,.0f} s of virtual time"
        return Figure(name="Duration", value=duration_text(seconds), unit="", note=note)

    def _told(self) -> Figure:
        last = self.rounds[-1]
        name = "Told the server"
        if self.run.baseline != "none":
            return Figure(name=name, value="weights", unit="", note="no activations leave a client")
        if not last.bits:
            return Figure(name=name, value="no bound", unit="", note="privacy is off")
        note = f"at most; {last.label_bits:.1f} bits/label, epsilon {last.row_epsilon:.3g} a row"
        return Figure(name=name, value=f"{last.bits:.1f}", unit="bits/token", note=note)

    @property
    def clients(self) -> list[ClientTotals]:
        """The contributions of each client, in the order of their numbers."""
        names = {name for stats in self.rounds for name in stats.by_client}
        return [self._client(name) for name in sorted(names, key=lambda n: (len(n), n))]

    def _client(self, name: str) -> ClientTotals:
        own = [stats.by_client[name] for stats in self.rounds if name in stats.by_client]
        losses = [each.loss for each in own if not math.isnan(each.loss)]
        tokens = sum(each.tokens for each in own)
        return ClientTotals(
            name=name,
            rounds=len(losses),
            steps=sum(each.steps for each in own),
            tokens=tokens,
            share=tokens / max(1, sum(stats.tokens for stats in self.rounds)),
            loss=losses[-1] if losses else math.nan,
            repeated=sum(each.repeated for each in own),
            refused=sum(each.refused for each in own),
            failed=sum(each.failed for each in own),
            bytes_up=sum(each.bytes_up for each in own),
            bytes_down=sum(each.bytes_down for each in own),
        )

    @property
    def troubles(self) -> list[Trouble]:
        """The contributions that were late, refused or missing; none for an undisturbed run."""
        found = []
        for field, (name, meaning) in _TROUBLES.items():
            counts = {stats.round: getattr(stats, field) for stats in self.rounds}
            if total := sum(counts.values()):
                rounds = ranges(number for number, count in counts.items() if count)
                found.append(Trouble(name=name, count=total, rounds=rounds, meaning=meaning))
        returns = [stats for stats in self.rounds if stats.went_back_from]
        return found + [
            Trouble(
                name="went back",
                count=1,
                rounds=f"{stats.went_back_from}",
                meaning=text_of_return(stats),
            )
            for stats in returns
        ]

    @property
    def traffic(self) -> list[Traffic]:
        """The bytes that crossed between clients and server, by direction."""
        steps = max(1, sum(stats.steps for stats in self.rounds))
        found = []
        for field, name in _DIRECTIONS.items():
            total = sum(getattr(stats, field) for stats in self.rounds)
            per_round = total / max(1, len(self.rounds))
            found.append(
                Traffic(name=name, total=total, per_round=per_round, per_step=total / steps)
            )
        return found

    @property
    def privacy(self) -> str:
        """What the server could learn of the clients' texts, in a line."""
        epsilon = self.rounds[-1].weights_epsilon
        weights = f" The client weights have epsilon {epsilon:.3g}." if epsilon else ""
        return self._told_by_activations() + weights

    def _told_by_activations(self) -> str:
        run, last = self.run, self.rounds[-1]
        if run.baseline != "none":
            return (
                f"baseline={run.baseline}: no activations leave the clients, but their weights do, "
                "and a server can often reconstruct training text from changes of weights."
            )
        if not last.bits:
            return (
                "privacy=off: text and labels stay with the clients, but the server can often "
                "reconstruct the text from the activations. Treat the model as trained on data "
                "that the server could read."
            )
        budget = run.privacy.budget_bits
        bound = f" The budget is {budget:g} bits/token." if budget else ""
        return (
            f"privacy={run.privacy.kind}, z={run.privacy.z:g}: the server was told at most "
            f"{last.told}, of the worst text, at delta 1e-5.{bound}"
        )

    @property
    def measured_leak(self) -> str:
        """The line about the leak that `privacy.audit=end` measured; empty without an audit."""
        card = self.folder.model / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        lines = text.partition("\n## Measured\n")[2].splitlines()
        return lines[-1].strip("`") if lines else ""

    @property
    def sample(self) -> str:
        """The words that the trained model writes; empty if it writes none."""
        file = self.folder.sample
        return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


_TROUBLES = {
    "late": ("late clients", "their steps came after a barrier had closed, and were repeated"),
    "failed": ("failed clients", "they did not finish the round"),
    "refused": ("refused steps", "they were stale at every attempt"),
    "short_steps": ("steps without a client", "it was awaited until policy.deadline_s was over"),
    "clipped_gradients": ("clipped gradients", "the guard found them out of proportion"),
    "refused_gradients": ("refused gradients", "they were not finite or far out of proportion"),
    "quarantines": ("quarantines", "a client was excluded after several refused gradients"),
    "refused_replies": ("refused replies", "a number or an array of them was impossible"),
    "clipped_replies": ("clipped replies", "their change of the weights was out of proportion"),
    "repeats": ("repetitions", "the round was trained again, because a client was missing"),
}
"""The counts of a round that an undisturbed run does not have, by field."""

_DIRECTIONS = {
    "bytes_up": "activations and gradients, up",
    "bytes_down": "activations and gradients, down",
    "client_weights_bytes": "client weights, both directions",
}


def _end_of(folder: RunFolder) -> str:
    return f"diverged: {folder.divergence}" if folder.divergence else "finished"


def _state_of(folder: RunFolder) -> str:
    """Return whether a run that is not over is trained now."""
    try:
        with folder.lock_file.open("r+", encoding="utf-8") as file:
            return "stopped" if atomic.lock(file, folder.path) else "training"
    except OSError:
        # Another user's run, or one on a disk that is only read: this process cannot learn it.
        return "not finished"


def counted(number: int, noun: str) -> str:
    """Return a number of things.

    >>> counted(1, "round"), counted(1200, "round")
    ('1 round', '1,200 rounds')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def bytes_text(num_bytes: float) -> str:
    """Return a number of bytes with a fitting unit.

    >>> bytes_text(1536), bytes_text(3 << 30), bytes_text(0)
    ('1.5 KiB', '3.0 GiB', '0 B')
    """
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 1024**power:
            return f"{num_bytes / 1024**power:,.1f} {unit}"
    return f"{num_bytes:.0f} B"


def duration_text(seconds: float) -> str:
    """Return a duration.

    >>> duration_text(0.74), duration_text(75), duration_text(90061)
    ('0.7 s', '1 min 15 s', '25 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(timedelta(seconds=seconds).total_seconds()), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers as text, with those in a row as a range.

    >>> ranges([1, 2, 3, 7])
    '1-3, 7'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
