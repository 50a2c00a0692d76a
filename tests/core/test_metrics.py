"""Rounds on disk: strict JSON, and the same rounds when they are read again."""

import json
import math

from fedsplit.metrics import RoundStats, append, parse


def stats(**changes: float) -> RoundStats:
    counts = dict.fromkeys(RoundStats.__dataclass_fields__, 1)
    return RoundStats(**(counts | changes))


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_rounds_come_back_as_they_were(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rounds = [stats(loss=0.1 + 0.2), stats(round=2, loss=1e-9)]
    for each in rounds:
        append(path, each)
    assert parse(path.read_text().splitlines()) == rounds


def test_what_was_not_measured_is_null_and_comes_back_as_nan(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append(path, stats(eval_loss=math.nan, bits_per_byte=math.nan))
    assert json.loads(path.read_text(), parse_constant=refuse)["eval_loss"] is None
    (again,) = parse(path.read_text().splitlines())
    assert math.isnan(again.eval_loss) and math.isnan(again.bits_per_byte)
    assert again.loss == 1
