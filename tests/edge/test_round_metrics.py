"""Every number that clients reply with is used, and every field of a round's record is filled."""

import ast
from dataclasses import fields
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsplit.config import compose
from fedsplit.flower import client_app
from fedsplit.flower.strategy.round_metrics import RoundMetrics, numbers_of
from fedsplit.spec import RunSpec
from fedsplit.telemetry.round import RoundStats
from fedsplit.trunk.norm_guard import GuardCounts
from tests.edge.federation import federate
from tests.house.source import tree

USED_ELSEWHERE = {"trained": {"done", "seconds", "skipped"}, "evaluated": {"loss", "bits-per-byte"}}
"""Numbers for the coordinator, and those that Flower alone averages for its `Result`."""


class Noting(dict[str, float]):
    """Numbers that know which of them were read."""

    def __init__(self, numbers: Any) -> None:
        super().__init__(numbers)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> float:
        self.read.add(name)
        return super().__getitem__(name)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    folder = tmp_path_factory.mktemp("runs")
    short = ["train=toy", "train.rounds=1", "train.local_steps=1", "clients=2"]
    return compose(["experiment=images", *short, f"launch.run_dir={folder}"])


@pytest.fixture(scope="module")
def replies(run: RunSpec) -> dict[str, Noting]:
    """The numbers of a client that trained and of one that evaluated."""
    found: dict[str, Noting] = {}
    app = ClientApp()
    app.query("hello")(client_app.hello)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = client_app.train(message, context)
        found["trained"] = Noting(numbers_of(reply))
        return reply

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        reply = client_app.evaluate(message, context)
        found["evaluated"] = Noting(numbers_of(reply))
        return reply

    federate(run, app)
    return found


def test_every_number_of_a_reply_is_used(run: RunSpec, replies: dict[str, Noting]) -> None:
    metrics = RoundMetrics(**{kind: [("a", numbers)] for kind, numbers in replies.items()})
    metrics.stats(
        run,
        1,
        seconds=1.0,
        virtual_seconds=1.0,
        version=1,
        short_steps=0,
        guard_counts=GuardCounts(),
        went_back_from=0,
        weights_epsilon=0.0,
    )
    unread = {kind: numbers.keys() - numbers.read for kind, numbers in replies.items()}
    assert unread == USED_ELSEWHERE


def test_every_field_of_a_round_is_filled() -> None:
    code = ast.walk(tree("fedsplit/flower/strategy/round_metrics.py"))
    calls = [n for n in code if isinstance(n, ast.Call) and ast.unparse(n.func) == "RoundStats"]
    filled = [{keyword.arg for keyword in call.keywords} for call in calls]
    assert filled == [{field.name for field in fields(RoundStats)}]
