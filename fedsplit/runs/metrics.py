"""The metrics of a run: what its rounds come to, and the table at its end."""

import math
from collections.abc import Sequence

from fedsplit.console import table_text
from fedsplit.telemetry.round import RoundStats, in_mib


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Return a loss in bits per byte, from its sum in nats over `num_bytes` UTF-8 bytes.

    >>> round(bits_per_byte(math.log(2) * 8, 4), 6)
    2.0
    """
    return nats / math.log(2) / max(1, num_bytes)


def evaluated(rounds: Sequence[RoundStats]) -> Sequence[RoundStats]:
    """Return the rounds with a held-out result; all rounds if none has one."""
    return [stats for stats in rounds if not math.isnan(stats.eval_loss)] or rounds


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
