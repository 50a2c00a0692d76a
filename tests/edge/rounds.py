"""Rounds that were never run, for what reads them."""

from dataclasses import replace

from fedsplit.telemetry.round import RoundStats


def round_stats(number: int, loss: float, **changes: float) -> RoundStats:
    """Return what a round of two clients might come to."""
    one = RoundStats(
        round=number,
        rounds=3,
        loss=loss + 1,
        eval_loss=loss,
        bits_per_byte=loss / 2,
        tokens=100,
        seconds=2.0,
        bytes_up=3 << 20,
        bytes_down=1 << 20,
        client_weights_bytes=1 << 20,
        clients=2,
        late=0,
        failed=0,
        version=number,
        steps=10,
        client_bytes=5 << 20,
    )
    return replace(one, **changes)
