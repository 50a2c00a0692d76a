"""Telemetry: events go to sinks, a broken sink ends nothing, and `metrics.jsonl` holds them."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest

from fedsplit.errors import StorageError
from fedsplit.telemetry.events import Event, RunBegan, StepTaken
from fedsplit.telemetry.jsonl import MetricsFile, MetricsLines
from fedsplit.telemetry.logs import RoundLog
from fedsplit.telemetry.readings import of_round
from fedsplit.telemetry.round import RoundStats, line_of
from fedsplit.telemetry.sinks import Sink, Telemetry
from tests.edge.rounds import round_stats

STEP = StepTaken(
    version=1,
    clients=("a", "b"),
    num_tokens=8,
    taken=1,
    lr=0.5,
    gradient_norm=2.0,
    waits_s=(0.5, 0.0),
)


def stats(number: int) -> RoundStats:
    counts = dict.fromkeys(RoundStats.__dataclass_fields__, 1) | {"by_client": {}}
    return RoundStats(**{**counts, "round": number})


class Kept(Sink):
    def __init__(self, failure: Exception | None = None) -> None:
        self.events: list[Event] = []
        self.failure = failure

    def on_event(self, event: Event) -> None:
        if self.failure:
            raise self.failure
        self.events.append(event)


def test_a_sink_that_fails_is_removed_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept = Kept()
    telemetry = Telemetry(Kept(RuntimeError("the tracker is away")), kept)
    telemetry.emit(STEP)
    telemetry.emit(STEP)
    assert kept.events == [STEP, STEP]
    assert caplog.text.count("the tracker is away") == 1


def test_an_error_of_ours_ends_what_the_event_is_of() -> None:
    with pytest.raises(StorageError, match="no room"):
        Telemetry(Kept(StorageError("no room"))).emit(STEP)


def test_telemetry_without_a_sink_that_needs_details_is_false() -> None:
    telemetry = Telemetry()
    assert not telemetry
    # The sinks that each run has.
    telemetry.add(RoundLog(logging.getLogger(__name__)))
    telemetry.add(MetricsLines(MetricsFile(Path("none")), steps=False, budget_s=0.0))
    assert not telemetry
    telemetry.add(Kept())
    assert telemetry
    telemetry.close()
    assert not telemetry


def test_by_default_the_file_has_rounds_alone(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    sink = MetricsLines(file, steps=False, budget_s=0.0)
    for event in (STEP, stats(1), STEP, stats(2)):
        sink.on_event(event)
    assert file.path.read_text("utf-8") == "".join(f"{line_of(stats(n))}\n" for n in (1, 2))


def test_on_request_the_steps_of_a_round_come_before_its_line(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    sink = MetricsLines(file, steps=True, budget_s=0.0)
    second = replace(STEP, version=2, gradient_norm=math.inf)
    for event in (STEP, second):
        sink.on_event(event)
    assert not file.path.exists()  # a round that is not finished leaves nothing
    for event in (stats(1), replace(STEP, version=3), stats(2)):
        sink.on_event(event)
    lines = [json.loads(line) for line in file.path.read_text("utf-8").splitlines()]
    assert [(line.get("step"), line["round"]) for line in lines] == [
        (1, 1),
        (2, 1),
        (None, 1),
        (3, 2),
        (None, 2),
    ]
    assert lines[0] | {"clients": (), "waits_s": ()} == {
        "step": 1,
        "round": 1,
        "clients": (),
        "num_tokens": 8,
        "taken": 1,
        "lr": 0.5,
        "gradient_norm": 2.0,
        "waits_s": (),
    }
    assert lines[1]["gradient_norm"] is None
    assert file.rounds() == [stats(1), stats(2)]
    file.forget_after(1)
    assert file.path.read_text("utf-8").count("\n") == 3 and file.rounds() == [stats(1)]
    file.forget_after(0)
    assert file.path.read_text("utf-8") == ""


def test_steps_that_are_taken_again_are_listed_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    sink = MetricsLines(file, steps=True, budget_s=0.0)
    for version in (4, 5, 6, 5):  # training went back to version 4
        sink.on_event(replace(STEP, version=version))
    sink.on_event(stats(1))
    lines = [json.loads(line) for line in file.path.read_text("utf-8").splitlines()]
    assert [line.get("step") for line in lines] == [4, 5, None]


@pytest.mark.parametrize(("gradient_z", "spent"), [(0.5, 0.75), (0.0, 0.5)])
def test_the_part_of_a_budget_is_that_of_rows_and_noisy_gradients(gradient_z, spent) -> None:
    settings = {"privacy.gradient_z": gradient_z}
    run = RunBegan(name="a", run_id="1", rounds=3, budget_bits=8.0, settings=settings)
    stats = round_stats(1, 2.0, bits=4.0, label_bits=2.0)
    found = {name: value for name, _, value in of_round(run, stats, 2.0)}
    assert found["privacy_budget_spent_ratio"] == spent
