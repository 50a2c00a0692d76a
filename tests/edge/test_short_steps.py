"""A barrier of policy=sync that goes on without a client reports it."""

import threading
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message

from tests.edge.federation import client_that, federate, metrics_lines, spec_for


def test_steps_without_a_client_that_starts_late_are_counted(tmp_path: Path) -> None:
    """client-1 starts when client-0 has taken its two steps, so neither waits for the other."""
    has_finished = threading.Event()

    def train(message: Message, context: Context, go_on: Callable[[], Message]) -> Message:
        is_first = context.node_config["partition-id"] == 0
        if not is_first:
            has_finished.wait(timeout=60)
        reply = go_on()
        if is_first:
            has_finished.set()
        return reply

    words = ["clients=2", "train.local_steps=2", "policy.deadline_s=0.2", "wire.budget_s=60"]
    folder = federate(spec_for(tmp_path, *words), client_that(train=train))
    (stats,) = folder.rounds()
    assert (stats.version, stats.steps, stats.short_steps) == (4, 4, 2)
    assert (stats.late, stats.failed, stats.refused) == (0, 0, 0)
    assert stats.line.endswith("0 failed, 2 steps without a client")
    assert metrics_lines(folder)[0]["short_steps"] == 2
    assert "\nsteps without a client" in folder.closing_table()
    card = (folder.path / "model" / "README.md").read_text(encoding="utf-8")
    assert "4 trunk steps (2 of them without a client that was awaited), " in card


def test_no_step_is_short_where_all_clients_start_together(tmp_path: Path) -> None:
    (stats,) = federate(spec_for(tmp_path, "train.local_steps=2")).rounds()
    assert (stats.version, stats.short_steps) == (2, 0)
    assert stats.line.endswith("0 late, 0 failed")
