"""The policies at the level of rounds: with machines of different speed, and with broken ones."""

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, Context, Message
from flwr.clientapp import ClientApp

from fedsplit.errors import ConfigError, Diverged
from fedsplit.flower import client_app
from fedsplit.flower.strategy.coordinator import RoundCoordinator
from fedsplit.flower.strategy.round_policy import Decision, Event
from fedsplit.runs.folder import RunFolder
from fedsplit.telemetry.round import RoundStats
from tests.edge.federation import client_that, federate, joined, spec_for, without_seconds

GoOn = Callable[[], Message]
SLOW = ("policy.sim_slowdown={client-2: 5}", "train.local_steps=2")
QUORUM = ("policy=quorum", "policy.quorum=2")


def name_of(context: Context) -> str:
    return f"client-{context.node_config['partition-id']}"


def round_of(message: Message) -> int:
    return int(message.content["fedsplit"]["round"])


def times_of(rounds: list[RoundStats]) -> list[float]:
    return [stats.virtual_seconds for stats in rounds]


# --- machines of different speed --------------------------------------------------------------


def test_sync_is_as_fast_as_the_slowest_machine(tmp_path: Path) -> None:
    run = spec_for(tmp_path, *SLOW, "train.rounds=2")
    rounds = federate(run).rounds()
    assert times_of(rounds) == [10.0, 10.0]
    assert [stats.clients for stats in rounds] == [3, 3]


def test_virtual_machines_do_not_change_what_sync_learns(tmp_path: Path) -> None:
    """Neither a clock nor who is slow matters where everybody waits for all."""
    words = ["train.local_steps=2", "train.rounds=2"]
    slow = federate(spec_for(tmp_path / "slow", *words, *SLOW)).rounds()
    even = federate(spec_for(tmp_path / "even", *words)).rounds()
    assert all(math.isnan(stats.virtual_seconds) for stats in even)
    timeless = [replace(stats, virtual_seconds=0.0) for stats in without_seconds(slow)]
    assert timeless == [replace(stats, virtual_seconds=0.0) for stats in without_seconds(even)]


def test_a_quorum_goes_on_without_the_slow_one_and_merges_it_later(tmp_path: Path) -> None:
    """Rounds take 2 seconds; the slow machine begins in the first and needs 10 and a barrier."""
    run = spec_for(tmp_path, *QUORUM, *SLOW, "train.rounds=6")
    rounds = federate(run).rounds()
    assert times_of(rounds)[:3] == [2.0] * 3
    assert [stats.clients for stats in rounds] == [2, 2, 2, 2, 3, 3]
    assert [stats.steps for stats in rounds] == [4, 4, 4, 4, 6, 6]
    assert [stats.failed for stats in rounds] == [0] * 6


def test_async_keeps_everybody_busy(tmp_path: Path) -> None:
    """The two others take 2 seconds for what the slow one takes 10 for, and never wait for it."""
    run = spec_for(tmp_path, "policy=async", *SLOW, "train.rounds=5", "train.evaluate_every=5")
    rounds = federate(run).rounds()
    assert times_of(rounds)[:3] == [4.0, 2.0, 4.0]
    seconds = sum(times_of(rounds[:4]))
    fast = 2 * int(seconds / 2) * 2  # two clients, two steps each in two seconds
    assert fast - 4 <= sum(stats.steps for stats in rounds[:4]) <= fast + 2 * seconds / 10 + 2
    assert rounds[-1].version == sum(stats.steps for stats in rounds), "every gradient is a step"


def test_an_evaluated_async_round_leaves_the_slow_one_out(tmp_path: Path) -> None:
    asked: list[tuple[int, str]] = []
    app = ClientApp()
    app.query("hello")(client_app.hello)
    app.train()(client_app.train)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        asked.append((round_of(message), name_of(context)))
        return client_app.evaluate(message, context)

    run = spec_for(tmp_path, "policy=async", *SLOW, "train.rounds=2")
    rounds = federate(run, app).rounds()
    assert times_of(rounds) == [4.0, 6.0], "the last round has everybody back"
    assert sorted(name for number, name in asked if number == 1) == ["client-0", "client-1"]
    assert len([name for number, name in asked if number == 2]) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [QUORUM, ("policy=async",), ("policy=async", "policy.buffer=2")],
    ids=["quorum", "async", "buffered"],
)
def test_the_same_numbers_in_every_run(tmp_path: Path, words: tuple[str, ...]) -> None:
    run = spec_for(tmp_path, *words, *SLOW, "train.rounds=4", "train.evaluate_every=2")
    first, second = federate(run), federate(run)
    assert without_seconds(first.rounds()) == without_seconds(second.rounds())
    one, other = joined(first), joined(second)
    assert all(one[name].equal(other[name]) for name in one)


def test_a_virtual_deadline_closes_a_round(tmp_path: Path) -> None:
    """The slow one is still out at 6 seconds, and back in the second round."""
    words = ["policy=quorum", "policy.quorum=3", "policy.deadline_s=1", "wire.budget_s=1"]
    words += ["policy.round_deadline_s=6"]
    rounds = federate(spec_for(tmp_path, *words, *SLOW, "train.rounds=2")).rounds()
    assert times_of(rounds)[0] == 6.0
    assert [stats.clients for stats in rounds] == [2, 3]


# --- machines that break ------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["quorum", "async"])
def test_a_client_that_breaks_in_a_round_is_back_in_the_next(tmp_path: Path, policy: str) -> None:
    has_broken = threading.Event()

    def train(message: Message, context: Context, go_on: GoOn) -> Message:
        if name_of(context) == "client-1" and round_of(message) == 1:
            has_broken.set()
            raise OSError("disk full")
        has_broken.wait(timeout=60)
        return go_on()

    words = ["train.rounds=2", "train.local_steps=2", f"policy={policy}", "policy.deadline_s=1"]
    rounds = federate(spec_for(tmp_path, *words), client_that(train=train)).rounds()
    assert [stats.failed for stats in rounds] == [1, 0]
    assert rounds[1].clients >= 3


@pytest.mark.parametrize("policy", ["sync", "quorum", "async"])
def test_one_that_breaks_does_not_stop_a_virtual_clock(tmp_path: Path, policy: str) -> None:
    def train(message: Message, context: Context, go_on: GoOn) -> Message:
        if name_of(context) == "client-1":
            raise OSError("disk full")
        return go_on()

    words = [f"policy={policy}", *SLOW, "train.rounds=2", "policy.quorum=2"]
    rounds = federate(spec_for(tmp_path, *words), client_that(train=train)).rounds()
    assert [stats.failed for stats in rounds] == [1, 1]
    assert all(stats.clients >= 1 for stats in rounds)


def test_one_that_hangs_is_given_up_and_its_late_reply_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others_went_on = threading.Event()
    apply = RoundCoordinator._apply

    def apply_when_two_are_back(coordinator: RoundCoordinator, event: Event) -> Decision:
        if (coordinator.rounds.round, len(coordinator.metrics.trained)) == (1, 2):
            coordinator._until = 0.0  # the time of the round is over
        return apply(coordinator, event)

    def train(message: Message, context: Context, go_on: GoOn) -> Message:
        reply = go_on()
        if round_of(message) == 2:
            others_went_on.set()
        elif name_of(context) == "client-0" and round_of(message) == 1:
            others_went_on.wait(timeout=60)
        return reply

    monkeypatch.setattr(RoundCoordinator, "_apply", apply_when_two_are_back)
    rounds = federate(spec_for(tmp_path, "train.rounds=3"), client_that(train=train)).rounds()
    assert [stats.failed for stats in rounds] == [1, 0, 0]
    assert rounds[0].clients == 2


@pytest.mark.parametrize("case", ["not finite", "no file of NumPy", "wider"])
def test_client_weights_that_are_no_numbers_are_refused(tmp_path: Path, case: str) -> None:
    def train(message: Message, context: Context, go_on: GoOn) -> Message:
        reply = go_on()
        if name_of(context) == "client-1":
            arrays = reply.content.array_records["arrays"]
            name, array = next(iter(arrays.items()))
            if case == "not finite":
                array = Array(array.numpy() * np.float32(math.nan))
            elif case == "wider":
                array = Array(np.full(array.shape, 1e300))
            else:
                array.data = array.data[:-1]
            arrays[name] = array
        return reply

    (stats,) = federate(spec_for(tmp_path), client_that(train=train)).rounds()
    assert (stats.clients, stats.failed) == (2, 1)
    assert math.isfinite(stats.eval_loss)


# --- more clients than workers, and how long it goes ----------------------------------------------


@pytest.mark.parametrize("policy", ["quorum", "async"])
def test_five_clients_on_two_workers(tmp_path: Path, policy: str) -> None:
    words = ["clients=5", "launch.workers=2", "sharding=iid", "data.held_out=0.3"]
    run = spec_for(tmp_path, *words, f"policy={policy}", "train.local_steps=2")
    (stats,) = federate(run).rounds()
    assert stats.failed == 0
    assert stats.clients >= (4 if policy == "quorum" else 5)


def test_it_is_evaluated_every_n_rounds_and_in_the_last(tmp_path: Path) -> None:
    rounds = federate(spec_for(tmp_path, "train.rounds=5", "train.evaluate_every=2")).rounds()
    assert [math.isnan(stats.eval_loss) for stats in rounds] == [True, False, True, False, False]


def test_training_stops_when_held_out_loss_does_not_improve(tmp_path: Path) -> None:
    words = ["train.rounds=9", "train.patience=2", "train.lr=1e-9", "train.schedule=constant"]
    words += [
        "client_weights.options.fraction_evaluate=1.0",
        "train.optimizer=sgd",
        "train.warmup_steps=0",
    ]
    rounds = federate(spec_for(tmp_path, *words)).rounds()
    losses = [stats.eval_loss for stats in rounds]
    best = losses.index(min(losses))
    assert len(rounds) == best + 3 < 9


def test_training_stops_when_all_clients_have_taken_their_steps(tmp_path: Path) -> None:
    words = ["train.rounds=9", "train.local_steps=2", "train.max_steps=3"]
    rounds = federate(spec_for(tmp_path, *words, "train.evaluate_every=9")).rounds()
    assert [stats.steps for stats in rounds] == [6, 3]
    assert math.isfinite(rounds[-1].eval_loss)


def test_a_strategy_that_wants_more_nodes_than_there_are_is_named(tmp_path: Path) -> None:
    words = ["client_weights.options.min_available_nodes=4", "launch.start_timeout_s=1"]
    with pytest.raises(ConfigError, match="there are 3 nodes to choose from, and the strategy"):
        federate(spec_for(tmp_path, *words))


def test_a_round_that_nobody_finishes_in_time_says_so(tmp_path: Path) -> None:
    words = [*SLOW, "policy=quorum", "policy.round_deadline_s=1", "wire.budget_s=1"]
    run = spec_for(tmp_path, *words)
    with pytest.raises(Diverged, match="none of 3 clients finished; .*nothing before the deadline"):
        federate(run)
    assert RunFolder(tmp_path / "runs" / "tiny").rounds() == []
