"""A run that diverges goes back to its last checkpoint, and if it diverges again it ends there."""

import math
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsplit.errors import ConfigError, Diverged, ProtocolError
from fedsplit.flower.records import METRICS, WEIGHT, JoinInfo
from fedsplit.flower.strategy import SplitStrategy
from fedsplit.flower.strategy.divergence import DivergenceGuard
from fedsplit.flower.strategy.round_metrics import RoundMetrics
from fedsplit.flower.trunk_server import TrunkServer
from fedsplit.model import initial_parts
from fedsplit.runs.checkpoint import Checkpoint, checkpoints_in
from fedsplit.runs.folder import RunFolder
from fedsplit.spec import GuardSpec, RunSpec, SplitSpec
from simulations.sweep import _finished
from tests.edge.federation import SGD, client_that, federate, joined, spec_for, without_seconds
from tests.edge.resuming import folder_of, interrupted, resumed

GoOn = Callable[[], Message]
KEPT = ("train.rounds=4", "train.local_steps=2", "train.save_every=1")


def worse(
    rounds: dict[str, list[int]], factor: float = 100.0, end: tuple[int, int] = (0, 0)
) -> ClientApp:
    """Clients that report a larger loss once in each of their rounds.

    At the `end`, a round and how often it has begun, their power is gone.
    """
    begun: Counter[str] = Counter()
    left = {client: list(numbers) for client, numbers in rounds.items()}

    def evaluate(message: Message, context: Context, go_on: GoOn) -> Message:
        join, reply = JoinInfo.of(message.content), go_on()
        if left.get(join.client, [])[:1] == [join.round]:
            del left[join.client][0]
            numbers = reply.content.metric_records[METRICS]
            for name in ("loss", "nats", "bits-per-byte"):
                numbers[name] = numbers[name] * factor  # type: ignore[operator]
        return reply

    def train(message: Message, context: Context, go_on: GoOn) -> Message:
        join = JoinInfo.of(message.content)
        begun[f"{join.client}/{join.round}"] += 1
        if (join.round, begun[f"{join.client}/{join.round}"]) == end:
            raise RuntimeError("the power is gone")
        return go_on()

    return client_that(train=train, evaluate=evaluate)


def everyone(*rounds: int) -> dict[str, list[int]]:
    return {f"client-{number}": list(rounds) for number in range(3)}


def slower_from(run: RunSpec, round: int) -> RunFolder:
    """The run that was resumed from a checkpoint with half the learning rate."""
    folder = interrupted(run, round + 1)
    path = checkpoints_in(folder.checkpoints)[round]
    groups = ("client_weights", "trunk", "strategy")
    saved = Checkpoint.read(path, run, f"server/{folder.id}", groups)
    saved.tensors["strategy"]["lr_scale"] = torch.tensor(0.5, dtype=torch.float64)
    saved.write(folder.checkpoints)
    return resumed(run)


def same_weights(one: RunFolder, other: RunFolder) -> bool:
    weights = joined(other)
    return all(tensor.equal(weights[name]) for name, tensor in joined(one).items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        (),
        ("strategy=splitfed_v1", "client_weights=personal_bottom"),
        ("baseline=fedavg",),
        ("policy=async", "policy.sim_slowdown={client-2: 3}"),
        ("policy=quorum", "policy.sim_slowdown={client-2: 3}", "policy.quorum=2"),
    ],
    ids=["sync", "v1", "fedavg", "async", "quorum"],
)
def test_a_bad_evaluation_brings_the_last_checkpoint_back_at_half_the_rate(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    wanted = slower_from(spec_for(tmp_path / "wanted", *KEPT, *words), 2)
    run = spec_for(tmp_path / "wanted", *KEPT, *words, f"launch.run_dir={tmp_path / 'runs'}")
    folder = federate(run, worse(everyone(3)))
    rounds = without_seconds(folder.rounds())
    assert [stats.went_back_from for stats in rounds] == [0, 0, 3, 0]
    alike = [replace(stats, went_back_from=0) for stats in rounds]
    assert alike == without_seconds(wanted.rounds())
    assert same_weights(folder, wanted)
    assert rounds[2].line.endswith("went back from round 3")
    text = "round 3 diverged; from round 2 on, half the learning rate"
    assert text in folder.closing_table()
    assert text in (folder.model / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_run_that_diverges_again_ends_with_the_last_good_weights(tmp_path: Path) -> None:
    run = spec_for(tmp_path, *KEPT, "train.schedule=constant")
    with pytest.raises(
        Diverged,
        match=r"round 4: .*over 10 times.*went back before.*model has the weights of round 3",
    ):
        federate(run, worse(everyone(3, 4), factor=1000.0))
    folder = folder_of(run)
    assert folder.is_finished and [stats.round for stats in folder.rounds()] == [1, 2, 3]
    card = (folder.model / "README.md").read_text(encoding="utf-8")
    assert "Training ended early, because it diverged (round 4: the held-out loss of" in card
    with pytest.raises(ConfigError, match=r"tiny ended, because it diverged \(round 4: "):
        resumed(run)
    assert _finished(run) is None, "a sweep does not take it for a result"
    three = spec_for(
        tmp_path, *KEPT, "train.schedule=constant", "train.rounds=3", f"launch.run_dir={tmp_path}/3"
    )
    assert same_weights(folder, federate(three, worse(everyone(3), factor=1000.0)))


@pytest.mark.slow
def test_trunk_and_clients_take_half_a_step(tmp_path: Path) -> None:
    words = ("train.save_every=1", *SGD)
    before = joined(federate(spec_for(tmp_path / "before", *words)))
    whole = joined(federate(spec_for(tmp_path / "whole", *words, "train.rounds=2")))
    slow = joined(slower_from(spec_for(tmp_path / "slow", *words, "train.rounds=2"), 1))
    for name, start in before.items():
        torch.testing.assert_close(2 * (slow[name] - start), whole[name] - start)


@pytest.mark.slow
def test_one_client_cannot_bring_the_run_back(tmp_path: Path) -> None:
    run = spec_for(tmp_path, *KEPT)
    folder = federate(run, worse({"client-1": [2, 3]}))
    assert [stats.went_back_from for stats in folder.rounds()] == [0] * 4
    clean = federate(spec_for(tmp_path, *KEPT, f"launch.run_dir={tmp_path / 'clean'}"))
    assert same_weights(folder, clean)


class Poisoned(SplitStrategy):
    """A method whose trunk once loses its values in the third round, as by a fault of memory."""

    is_poisoned = False

    def train(self, number: int, arrays: ArrayRecord, config: ConfigRecord) -> ArrayRecord:
        if number == 3 and not self.is_poisoned:
            self.is_poisoned = True
            engine = self.trunk_server.service.engine
            broken = {name: value * math.nan for name, value in self.trunk.named_parameters()}
            engine.run(lambda: [p.data.copy_(broken[n]) for n, p in self.trunk.named_parameters()])
        return super().train(number, arrays, config)

    def make_server(self, trunk):
        self.trunk = trunk
        return super().make_server(trunk)


@pytest.mark.slow
def test_a_trunk_with_nan_goes_back(tmp_path: Path) -> None:
    wanted = slower_from(spec_for(tmp_path / "wanted", *KEPT, "train.local_steps=3"), 2)
    run = spec_for(
        tmp_path / "wanted",
        *KEPT,
        "train.local_steps=3",
        f"strategy.target={__name__}.Poisoned",
        f"launch.run_dir={tmp_path / 'runs'}",
    )
    folder = federate(run)
    assert [stats.went_back_from for stats in folder.rounds()] == [0, 0, 3, 0]
    assert same_weights(folder, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("end", [(3, 2), (4, 1)], ids=["before the next checkpoint", "after it"])
def test_a_run_that_went_back_is_resumed_as_such(tmp_path: Path, end: tuple[int, int]) -> None:
    run = spec_for(tmp_path, *KEPT)
    whole = replace(run, launch=replace(run.launch, run_dir=str(tmp_path / "whole")))
    wanted = federate(whole, worse(everyone(3)))
    with pytest.raises(Diverged, match="the power is gone"):
        federate(run, worse(everyone(3), end=end))
    folder = resumed(run)
    assert without_seconds(folder.rounds()) == without_seconds(wanted.rounds())
    assert same_weights(folder, wanted)


def test_the_trunk_is_served_at_its_address_again_unless_that_is_taken(tiny_llama: Any) -> None:
    parts = initial_parts(tiny_llama(), SplitSpec.parse("1/*/1"), 0)
    server = TrunkServer(parts.trunk, RunSpec(split=SplitSpec.parse("1/*/1")))
    with server:
        first = server.address
    server.renew()
    with server:
        assert server.address == first
    server.renew()
    host, _, port = first.rpartition(":")
    with socket.create_server((host, int(port))), server:
        assert server.address.rpartition(":")[0] == host and server.address != first


# --- the rules --------------------------------------------------------------------------------


THREE = RunSpec(clients=3, guard=GuardSpec(worse_loss=10, bad_steps=3))


def evaluated(unmeasured: str = "", **losses: float) -> RoundMetrics:
    metrics = RoundMetrics(unmeasured=set(unmeasured))
    metrics.evaluated += [(name, {"loss": loss, WEIGHT: 1}) for name, loss in losses.items()]
    return metrics


def trained(asked: str, broken: str = "", steps: int = 0, **skipped: int) -> RoundMetrics:
    metrics = RoundMetrics(asked=set(asked), broken=set(broken))
    for name, number in skipped.items():
        metrics.trained.append((name, {"steps": steps, "skipped": number, "loss": 2.0}))
    return metrics


def test_more_than_half_of_all_clients_decide() -> None:
    guard = DivergenceGuard(THREE)
    assert not guard.problem_in(evaluated(a=1.0, b=1.0, c=1.0))
    assert not guard.problem_in(evaluated(a=1.0, b=500.0, c=9.0))
    assert not guard.problem_in(evaluated("a", b=9.0, c=1.0)), "b is well again"
    assert not guard.problem_in(evaluated("a")), "alone in its round"
    assert "of 2 of 3 clients is not finite, or over 10 times" in guard.problem_in(evaluated(c=11))
    assert not guard.is_calm
    off = DivergenceGuard(replace(THREE, guard=GuardSpec(worse_loss=0)))
    assert not off.problem_in(evaluated("abc"))


def test_a_loss_is_compared_with_the_first_training_loss_and_not_with_nearly_zero() -> None:
    guard = DivergenceGuard(THREE)
    assert not guard.problem_in(trained("abc", steps=1, a=0, b=0, c=0))
    assert "over 10 times" in guard.problem_in(evaluated(a=21, b=21, c=21))
    assert not guard.problem_in(evaluated(a=0.0, b=0.0, c=0.0))
    assert not guard.problem_in(evaluated(a=0.9, b=0.9, c=0.9))


def test_steps_that_clients_could_not_take_are_counted_over_rounds() -> None:
    guard = DivergenceGuard(THREE)
    assert not guard.problem_in(trained("abc", a=2, b=2, c=0))
    assert not guard.is_calm
    assert not guard.problem_in(trained("abc", broken="a")), "alone"
    assert "could not take their last 3 steps" in guard.problem_in(trained("b", broken="b"))
    assert not guard.problem_in(trained("abc", broken="ab", steps=1, c=0)), "c can train"
    assert guard.is_calm
    again = DivergenceGuard(THREE)
    again.load_state(guard.state())
    assert again.problem_in(trained("c", c=1)) and again.state() == guard.state() | {
        "bad_steps/c": torch.tensor(1.0, dtype=torch.float64)
    }


JOIN = JoinInfo(
    client="c", round=1, address="", token="", config="", tokenizer="", run_id="", lr_scale=0.5
)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"lr_scale": math.nan}, "scales the learning rate by nan"),
        ({"lr_scale": 1e9}, "scales the learning rate by 1000000000.0"),
        ({"state": -1}, "ids of states, which must be whole numbers from 0 on"),
        ({"next_state": "../x"}, "ids of states, which must be whole numbers from 0 on"),
        ({"kept_states": ["a"]}, "ids of states, which must be whole numbers from 0 on"),
        ({"kept_states": 5}, "sent 5 as kept_states, which must be a list"),
        ({"branches": [1]}, "has 14 values, not 13; the first difference is 'branches'"),
        ({"lr_scale": "x"}, "scales the learning rate by x"),
    ],
)
def test_a_client_refuses_an_impossible_state_or_rate(fields: dict[str, Any], text: str) -> None:
    content = JOIN.put_into(RecordDict())
    assert JoinInfo.of(content) == JOIN
    content["fedsplit"] = ConfigRecord({**content.config_records["fedsplit"], **fields})
    with pytest.raises(ProtocolError, match=text):
        JoinInfo.of(content)
