"""Rounds on disk: strict JSON, and the same rounds when they are read again."""

import json
import math
from dataclasses import replace

from fedsplit.runs.metrics import closing_table
from fedsplit.telemetry.round import RoundStats, line_of, parse


def stats(**changes: float) -> RoundStats:
    counts = dict.fromkeys(RoundStats.__dataclass_fields__, 1) | {"by_client": {}}
    return RoundStats(**(counts | changes))


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_rounds_come_back_as_they_were():
    rounds = [stats(loss=0.1 + 0.2), stats(round=2, loss=1e-9)]
    assert parse(map(line_of, rounds)) == rounds


def test_what_was_not_measured_is_null_and_comes_back_as_nan():
    line = line_of(stats(eval_loss=math.nan, bits_per_byte=math.nan))
    assert json.loads(line, parse_constant=refuse)["eval_loss"] is None
    (again,) = parse([line])
    assert math.isnan(again.eval_loss) and math.isnan(again.bits_per_byte)
    assert again.loss == 1


NAN = math.nan


def test_a_line_says_what_was_measured():
    text = stats(bits_per_byte=2.25, accuracy=NAN, virtual_seconds=NAN)
    assert "held-out 2.2500 bits/byte" in text.line and "tokens/s  up" in text.line
    classes = stats(eval_loss=0.5, accuracy=0.905, virtual_seconds=12.0)
    assert "held-out 0.5000 loss 90.5% right" in classes.line
    assert "examples/s  12 s virtual  up" in classes.line
    assert "held-out not measured" in stats(eval_loss=NAN, accuracy=NAN).line


def test_what_the_guard_did_is_reported():
    guarded = dict(clipped_gradients=2, refused_gradients=3, quarantines=1)
    attacked = stats(refused_replies=0, short_steps=0, went_back_from=0, repeats=0, **guarded)
    assert attacked.line.endswith(", 2 gradients clipped, 3 gradients refused, 1 in quarantine")
    assert "gradients clipped, refused      2, 3" in closing_table([attacked])
    quiet = replace(attacked, **dict.fromkeys(guarded, 0))
    assert "gradients" not in quiet.line and "refused" not in closing_table([quiet])


def test_a_round_says_from_which_one_training_went_back():
    back = stats(round=5, went_back_from=7)
    assert back.line.endswith("went back from round 7")
    row = (
        "went back                       round 7 diverged; from round 4 on, half the learning rate"
    )
    assert row in closing_table([back])


def test_the_closing_table_goes_by_the_rounds_that_were_evaluated():
    losses = {1: NAN, 2: 0.5, 3: NAN, 4: 0.75}
    rounds = [
        stats(round=n, rounds=4, eval_loss=loss, bits_per_byte=loss, accuracy=NAN)
        for n, loss in losses.items()
    ]
    table = closing_table(rounds)
    assert "4 of 4, 1 trunk steps, 4 client steps" in table
    assert "round 2                         held-out 0.5000" in table
    assert "last (round 4)                  held-out 0.7500" in table
    assert "best (round 2)                  held-out 0.5000" in table
    guessing = closing_table(rounds, vocabulary=1000)
    uniform = f"guessing among 1,000 tokens     held-out {math.log(1000):.4f} bits/byte"
    assert uniform in guessing and "guessing" not in table
    never = closing_table([stats(eval_loss=NAN, accuracy=NAN, virtual_seconds=NAN)])
    assert "held-out not measured" in never and "virtual" not in never
