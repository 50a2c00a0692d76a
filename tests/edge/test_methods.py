"""Each method trains as it says, what the wrapped strategy remembers survives, who is sampled."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedYogi, Strategy
from safetensors.torch import load, save
from transformers import AutoTokenizer

from fedsplit.client.objective import ClientObjective, Prediction
from fedsplit.errors import CheckpointError, ConfigError
from fedsplit.flower.inline import _identify_this_process
from fedsplit.flower.strategy import SplitStrategy
from fedsplit.flower.strategy.aggregate import fedasync, fedbuff, with_dtypes_of
from fedsplit.flower.strategy.state import load_state_into, state_of
from fedsplit.model.describe import config_of, parts_of
from fedsplit.runs.folder import RunFolder
from fedsplit.telemetry.round import RoundStats
from tests.edge.federation import SGD, client_that, federate, joined, spec_for

GoOn = Callable[[], Message]


@pytest.fixture(autouse=True)
def identity() -> None:
    """A message has a sender: Flower's of this process."""
    _identify_this_process()


def name_of(context: Context) -> str:
    return f"client-{context.node_config['partition-id']}"


def arrays_of(message: Message) -> dict[str, torch.Tensor]:
    return dict(message.content.array_records["arrays"].to_torch_state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def change_of(folder: RunFolder, run: Any, block: str) -> float:
    """How far the parameters of a part have moved since the beginning."""
    tokenizer = AutoTokenizer.from_pretrained(folder.path / "model")
    parts = parts_of(run, config_of(run, tokenizer))
    before = {**parts.client.state_dict(), **parts.trunk.state_dict()}
    after = joined(folder)
    names = [name for name in before if f".{block}." in name and name in after]
    assert names
    return max((before[name] - after[name]).abs().max().item() for name in names)


# --- the methods ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "version", "trunk_moves"),
    [
        (("strategy=splitfed_v1",), 12, True),
        (("strategy=sequential",), 12, True),
        (("strategy=mu_splitfed", "train.trunk_steps=3"), 12, True),
        (("strategy=local_loss",), 0, False),
        (("train.mode=frozen_trunk",), 0, False),
    ],
    ids=["v1", "sequential", "mu", "local loss", "frozen trunk"],
)
def test_a_method_learns(
    tmp_path: Path, words: tuple[str, ...], version: int, trunk_moves: bool
) -> None:
    """Two rounds of two steps of three clients; `tiny_gpt2` has its trunk in blocks 1 and 2."""
    run = spec_for(tmp_path, "train.rounds=2", "train.local_steps=2", "train.lr=0.01", *words)
    folder = federate(run)
    first, last = folder.rounds()
    assert last.eval_loss < first.eval_loss < 5.75
    assert (last.steps, last.clients, last.version) == (6, 3, version)
    assert (change_of(folder, run, "h.1") > 0) == trunk_moves
    assert change_of(folder, run, "h.0") > 1e-4
    assert change_of(folder, run, "h.3") > 1e-4


@pytest.mark.slow
def test_v1_with_one_step_of_sgd_is_v2(tmp_path: Path) -> None:
    """The mean of the replicas' steps is the step on the mean: weights are tokens in both."""
    words = ["train.rounds=2", "sharding=iid", *SGD]
    v1, v2 = (
        joined(federate(spec_for(tmp_path / method, f"strategy={method}", *words)))
        for method in ("splitfed_v1", "splitfed_v2")
    )
    assert max((v1[name] - v2[name]).abs().max().item() for name in v1) < 1e-6


def test_in_v1_nobody_waits_within_a_round(tmp_path: Path) -> None:
    """A client's steps are its own: they take as long as its machine, not as the slowest one's."""
    slow = "policy.sim_slowdown={client-2: 5}"
    words = ["train.local_steps=2", slow]
    rounds = federate(spec_for(tmp_path, "strategy=splitfed_v1", *words)).rounds()
    assert [stats.virtual_seconds for stats in rounds] == [10.0]


def test_sequential_hands_the_client_weights_from_client_to_client(tmp_path: Path) -> None:
    began: list[tuple[str, dict[str, torch.Tensor]]] = []
    ended: list[dict[str, torch.Tensor]] = []

    def train(message: Message, context: Context, go_on: GoOn) -> Message:
        began.append((name_of(context), arrays_of(message)))
        reply = go_on()
        ended.append(arrays_of(reply))
        return reply

    run = spec_for(tmp_path, "strategy=sequential", "train.rounds=2", "seed=3")
    federate(run, client_that(train=train))
    names = [name for name, _ in began]
    assert sorted(names[:3]) == sorted(names[3:]) == ["client-0", "client-1", "client-2"]
    assert names[:3] != names[3:], "the order is drawn anew"
    for (_, given), left in zip(began[1:], ended, strict=False):
        assert same(given, left)


def test_sequential_goes_on_without_a_client_that_fails(tmp_path: Path) -> None:
    def train(message: Message, context: Context, go_on: GoOn) -> Message:
        if name_of(context) == "client-1":
            raise OSError("disk full")
        return go_on()

    run = spec_for(tmp_path, "strategy=sequential")
    (stats,) = federate(run, client_that(train=train)).rounds()
    assert (stats.clients, stats.failed, stats.version) == (2, 1, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["strategy=splitfed_v1", "policy=async"], "policy=async does not go with SplitFedV1"),
        (["strategy=splitfed_v1", "train.mode=frozen_trunk"], "SplitFedV1 averages trunks that"),
        (["strategy=splitfed_v1", "train.clients_per_pass=2"], "gives each a replica of its own"),
        (["strategy=sequential", "train.clients_per_pass=2"], "lets one work at a time; use"),
        (["strategy=sequential", "policy.combine=median"], "lets one train at a time; use"),
        (["strategy=sequential", "policy=quorum"], "does not go with Sequential; use policy=sync"),
        (["strategy=mu_splitfed", "train.trunk_steps=1"], "set train.trunk_steps to 2 or more"),
        (["strategy=local_loss", "train.mode=joint"], "LocalLoss with train.mode=joint"),
        (["train.mode=isolated"], "trains the bottom on a loss at the client, but ClientObjective"),
        (
            ["strategy=sequential", "FedMedian"],
            "hands the client weights from client to client, so ",
        ),
        (["policy=async", "FedMedian"], "policy=async mixes client weights by itself"),
        (["client_weights=personal", "FedMedian"], "personal=both leaves nothing to aggregate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_method_refuses_a_run_that_does_not_fit(
    tmp_path: Path, words: list[str], message: str
) -> None:
    short = "client_weights.strategy=flwr.serverapp.strategy."
    words = [word if "=" in word else short + word for word in words]
    with pytest.raises(ConfigError, match=message):
        federate(spec_for(tmp_path, *words))
    assert not (tmp_path / "runs").exists()


class Standstill(ClientObjective):
    """Nothing: its gradients are zero."""

    def loss(self, prediction: Prediction) -> torch.Tensor:
        return 0.0 * prediction.loss


class StandsStill(SplitStrategy):
    """A method whose clients minimize nothing."""

    client_objective = Standstill


def test_clients_minimize_the_objective_of_the_strategy(tmp_path: Path) -> None:
    run = spec_for(tmp_path, f"strategy.target={__name__}.StandsStill", *SGD)
    folder = federate(run)
    changes = [change_of(folder, run, block) for block in ("h.0", "h.1", "h.3")]
    assert changes == pytest.approx([0.0] * 3, abs=1e-7)  # the mean of equal weights is rounded


# --- the client weights -----------------------------------------------------------------------


@pytest.mark.parametrize("place", ["both", "bottom"])
def test_personal_parts_do_not_travel(tmp_path: Path, place: str) -> None:
    sent: list[int] = []

    def train(message: Message, context: Context, go_on: GoOn) -> Message:
        reply = go_on()
        sent.append(len(message.content.array_records.get("arrays", {})))
        sent.append(len(reply.content.array_records.get("arrays", {})))
        return reply

    run = spec_for(tmp_path, f"client_weights.personal={place}", "train.rounds=2", "train.lr=0.01")
    folder = federate(run, client_that(train=train))
    first, last = folder.rounds()
    assert not folder.sample.exists(), "a part of model/ is untrained"
    assert last.eval_loss < first.eval_loss
    assert (set(sent) == {0}) == (place == "both")
    assert (first.client_weights_bytes == 0) == (place == "both")


def test_the_proximal_term_of_fedprox_reaches_the_clients(tmp_path: Path) -> None:
    told: list[float] = []

    def train(message: Message, context: Context, go_on: GoOn) -> Message:
        told.append(message.content.config_records["config"]["proximal-mu"])
        return go_on()

    words = [
        "client_weights.strategy=flwr.serverapp.strategy.FedProx",
        "client_weights.options.proximal_mu=0.5",
    ]
    federate(spec_for(tmp_path, *words, "policy=async"), client_that(train=train))
    assert set(told) == {0.5}


def sampled(folder: Path) -> tuple[list[RoundStats], list[tuple[int, str]]]:
    """Who trains in a run that samples a quarter of 20 clients."""
    seen: list[tuple[int, str]] = []

    def train(message: Message, context: Context, go_on: GoOn) -> Message:
        seen.append((int(message.content["fedsplit"]["round"]), name_of(context)))
        return go_on()

    words = ["clients=20", "sharding=iid", "train.rounds=2", "data.held_out=0.5"]
    options = "client_weights.options={fraction_train: 0.25, fraction_evaluate: 0.1}"
    run = spec_for(folder, *words, options)
    rounds = federate(run, client_that(train=train)).rounds()
    return rounds, sorted(seen)


def test_the_same_clients_are_sampled_in_every_run(tmp_path: Path) -> None:
    rounds, seen = sampled(tmp_path / "one")
    again, seen_again = sampled(tmp_path / "two")
    assert [stats.clients for stats in rounds] == [5, 5]
    assert [stats.eval_loss for stats in rounds] == [stats.eval_loss for stats in again]
    assert seen == seen_again
    first, second = ({name for number, name in seen if number == n} for n in (1, 2))
    assert len(first) == len(second) == 5
    assert first != second


# --- what the wrapped strategy remembers ------------------------------------------------------


class Nodes(SimpleNamespace):
    """As much of a grid as choosing two nodes takes."""

    def get_node_ids(self) -> list[int]:
        return [1, 2]


def record(seed: int) -> ArrayRecord:
    chance = np.random.default_rng(seed)
    shapes = {"w": (3, 2), "b": (2,), "scale": ()}
    return ArrayRecord(
        {n: Array(np.asarray(chance.normal(size=s), np.float32)) for n, s in shapes.items()}
    )


def aggregate(strategy: Strategy, round: int, arrays: ArrayRecord) -> ArrayRecord:
    """A round of a strategy by itself, over two made-up replies."""
    messages = list(strategy.configure_train(round, arrays, ConfigRecord(), Nodes()))
    replies = []
    for i, message in enumerate(messages):
        metrics = MetricRecord({"num-examples": 1 + i, "loss": 1.0})
        content = RecordDict({"arrays": record(10 * round + i), "metrics": metrics})
        replies.append(Message(content, reply_to=message))
    new, _ = strategy.aggregate_train(round, replies)
    assert new is not None
    return with_dtypes_of(new, arrays)


def as_bytes(arrays: ArrayRecord) -> dict[str, bytes]:
    return {name: array.numpy().tobytes() for name, array in arrays.items()}


@pytest.mark.parametrize(
    "make",
    [
        lambda: FedAdam(beta_1=0.9, beta_2=0.99),
        lambda: FedYogi(beta_1=0.9, beta_2=0.99),
        lambda: FedAvgM(server_momentum=0.9, server_learning_rate=0.5),
    ],
    ids=["FedAdam", "FedYogi", "FedAvgM"],
)
def test_a_strategy_that_remembers_goes_on_to_the_same_numbers(
    make: Callable[[], Strategy],
) -> None:
    lasting, arrays = make(), record(0)
    for number in (1, 2):
        arrays = aggregate(lasting, number, arrays)
    told = load(save(state_of(lasting)))  # as a checkpoint keeps it, in an order of its own
    restored, forgetful = make(), make()
    load_state_into(restored, told)
    expected = as_bytes(aggregate(lasting, 3, arrays))
    assert as_bytes(aggregate(restored, 3, arrays)) == expected
    assert as_bytes(aggregate(forgetful, 3, arrays)) != expected
    assert same(state_of(restored), state_of(lasting))


@pytest.mark.parametrize("make", [FedAdam, lambda: FedAvgM(server_momentum=0.9)])
def test_a_strategy_that_goes_back_to_its_beginning_remembers_nothing(
    make: Callable[[], Strategy],
) -> None:
    strategy = make()
    begun = load(save(state_of(strategy)))
    aggregate(strategy, 1, record(0))
    load_state_into(strategy, begun)
    assert same(state_of(strategy), begun)
    expected = as_bytes(aggregate(make(), 1, record(0)))
    assert as_bytes(aggregate(strategy, 1, record(0))) == expected


def test_the_memory_of_another_strategy_is_refused() -> None:
    strategy = FedAdam()
    aggregate(strategy, 1, record(0))
    with pytest.raises(CheckpointError, match="with 'current_arrays', which FedAvg does not have"):
        load_state_into(FedAvg(), state_of(strategy))


# --- mixing -----------------------------------------------------------------------------------


def test_fedasync_mixes_and_fedbuff_moves() -> None:
    now, began, came = (
        ArrayRecord({"w": Array(np.full(2, value, np.float32))}) for value in (1.0, 2.0, 6.0)
    )
    assert fedasync(now, [(began, came, 0.5)])["w"].numpy().tolist() == [3.5, 3.5]
    changes = [(began, came, 0.5), (began, now, 1.0)]
    assert fedbuff(now, changes)["w"].numpy().tolist() == [1.5, 1.5]
    assert now["w"].numpy().tolist() == [1.0, 1.0]
