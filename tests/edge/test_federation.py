"""A federation against the unsplit model, and through everything that clients may do to it."""

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsplit.config import compose, from_run_config, to_yaml
from fedsplit.errors import (
    BadTensor,
    ConfigError,
    DeadlineExceeded,
    Diverged,
    FedsplitError,
    ModelMismatch,
)
from fedsplit.flower.client_app import app as product
from fedsplit.flower.client_app import hello
from fedsplit.flower.inline import run_inline
from fedsplit.flower.server_app import app as server
from fedsplit.link import Link
from fedsplit.model import join_model
from fedsplit.model.describe import config_of, parts_of
from fedsplit.model.lora import save_adapter
from fedsplit.spec import RunSpec, WireSpec
from fedsplit.transport.client import GrpcLink
from fedsplit.transport.server import GrpcServer
from fedsplit.wire import messages as m
from tests.edge.federation import (
    SGD,
    client_that,
    federate,
    joined,
    largest_difference,
    overrides_for,
    run_config,
    sgd_step,
    spec_for,
    union_of_batches,
    without_seconds,
)

GoOn = Callable[[], Message]

quiet_peft = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning"),
]
pytestmark = quiet_peft


def partition(context: Context) -> int:
    return int(context.node_config["partition-id"])


def round_of(message: Message) -> int:
    return int(message.content["fedsplit"]["round"])


# --- the unsplit model is the judge -----------------------------------------------------------


def test_a_federation_is_the_unsplit_model_on_the_union_of_the_batches(tmp_path: Path) -> None:
    run = spec_for(tmp_path, "train.rounds=2", "sharding=iid", *SGD)
    folder = federate(run)
    tokenizer = AutoTokenizer.from_pretrained(folder.path / "model")
    parts = parts_of(run, config_of(run, tokenizer))
    whole = join_model(parts.client, parts.trunk)
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    batches = [union_of_batches(run, tokenizer, number) for number in (1, 2)]
    losses = [sgd_step(whole, union, run.train.lr) for union in batches]
    after = joined(folder)
    assert largest_difference(before, after) > 1e-3
    assert largest_difference(dict(whole.state_dict()), after) <= 1e-6
    assert [stats.loss for stats in folder.rounds()] == pytest.approx(losses, abs=1e-6)
    assert [stats.version for stats in folder.rounds()] == [1, 2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its tokenizer in a directory, as transformers wrote them."""
    folder = tmp_path_factory.mktemp("base")
    return federate(spec_for(folder, "seed=5")).path / "model"


def test_lora_on_a_checkpoint_is_peft_on_the_unsplit_model(
    tmp_path: Path, checkpoint: Path
) -> None:
    given = ["model=pretrained", f"model.pretrained={checkpoint}", "lora=on", "lora.rank=2"]
    words = overrides_for(tmp_path, "train.rounds=2", *SGD, *given)
    run = compose([word for word in words if not word.startswith("model.config.")])
    folder = federate(run)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    parts = parts_of(run, config_of(run, tokenizer))
    save_adapter(parts.client, parts.trunk, tmp_path / "initial")
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    whole = PeftModel.from_pretrained(base, tmp_path / "initial", is_trainable=True)
    for number in (1, 2):
        sgd_step(whole, union_of_batches(run, tokenizer, number), run.train.lr)

    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(checkpoint), folder.path / "adapter"
    )
    expected = {name: t for name, t in whole.state_dict().items() if "lora_" in name}
    got = {name: t for name, t in adapted.state_dict().items() if "lora_" in name}
    assert max(t.abs().max().item() for n, t in got.items() if "lora_B" in n) > 1e-3
    assert largest_difference(expected, got) <= 1e-6

    ids_BT = union_of_batches(run, tokenizer, 1)[0].inputs["input_ids"]
    folded = AutoModelForCausalLM.from_pretrained(folder.path / "model")
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids_BT).logits, whole.eval()(ids_BT).logits)
        torch.testing.assert_close(folded(ids_BT).logits, whole(ids_BT).logits)


def test_the_same_run_twice_gives_the_same_numbers_and_weights(tmp_path: Path) -> None:
    run = spec_for(tmp_path, "train.rounds=2", "train.local_steps=2", "sharding=iid")
    first = federate(run)
    second = federate(run)
    assert (first.path.name, second.path.name) == ("tiny", "tiny-2")
    assert without_seconds(first.rounds()) == without_seconds(second.rounds())
    weights = [folder.path / "model" / "model.safetensors" for folder in (first, second)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_another_seed_gives_other_numbers(tmp_path: Path) -> None:
    losses = {federate(spec_for(tmp_path, f"seed={s}")).rounds()[0].loss for s in (0, 1)}
    assert len(losses) == 2


def test_the_default_experiment_keeps_its_losses(
    tmp_path: Path, golden: Callable[[str, object], object]
) -> None:
    """At toy size. The text is part of Python and differs with it, so a copy of none is used.

    Sums of floats differ between processors in the last digits: four decimals stay.
    """
    run = spec_for(
        tmp_path, "clients=4", "train.rounds=3", "train.local_steps=3", "sharding=natural"
    )
    default = replace(compose().train, rounds=3, local_steps=3, batch_size=2, warmup_steps=2)
    rounds = federate(replace(run, train=default)).rounds()
    got = [[stats.round, stats.loss, stats.eval_loss, stats.bits_per_byte] for stats in rounds]
    expected = golden("federation_losses", [[r, *(round(x, 4) for x in xs)] for r, *xs in got])
    assert isinstance(expected, list)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)


# --- any Flower strategy for the client weights -----------------------------------------------


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> float:
    folder = tmp_path_factory.mktemp("fedavg")
    return federate(spec_for(folder, "train.rounds=2")).rounds()[1].eval_loss


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FedAvgM", ["server_momentum=0.9", "server_learning_rate=0.5"]),
        ("FedAdam", ["eta=0.001"]),
        ("FedMedian", []),
        ("Krum", ["num_malicious_nodes=1"]),
        ("FedTrimmedAvg", ["beta=0.4"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_strategy_for_the_client_weights(
    tmp_path: Path, averaged: float, name: str, options: list[str]
) -> None:
    words = [f"client_weights.strategy=flwr.serverapp.strategy.{name}", "train.rounds=2"]
    words += [f"client_weights.options.{option}" for option in options]
    rounds = federate(spec_for(tmp_path, *words)).rounds()
    assert [stats.clients for stats in rounds] == [3, 3]
    assert abs(rounds[1].eval_loss - averaged) > 1e-4
    assert rounds[1].eval_loss == pytest.approx(averaged, abs=1.0)


def test_a_strategy_may_leave_evaluation_out(tmp_path: Path) -> None:
    run = spec_for(tmp_path, "client_weights.options.fraction_evaluate=0.0")
    (stats,) = federate(run).rounds()
    assert stats.clients == 3
    assert stats.eval_loss != stats.eval_loss  # not a number: nothing was measured


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("client_weights.strategy=nowhere.FedAvg", "'nowhere.FedAvg' cannot be imported"),
        ("strategy.target=strategies.Nothing", "'strategies.Nothing' cannot be imported"),
        (
            "client_weights.strategy=fractions.Fraction",
            "name a subclass of flwr.serverapp.strategy",
        ),
        ("client_weights.options.alpha=1", "FedAvg refuses the options .*alpha"),
    ],
    ids=str,
)
def test_an_unknown_strategy_is_refused_and_leaves_nothing(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        federate(spec_for(tmp_path, override))
    assert not (tmp_path / "runs").exists()


# --- clients: few, many, more than workers -----------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("clients", "workers", "sharding"),
    [(1, 0, "natural"), (20, 0, "iid"), (5, 2, "iid"), (3, 1, "natural")],
    ids=lambda value: str(value),
)
def test_any_number_of_clients_finishes(
    tmp_path: Path, clients: int, workers: int, sharding: str
) -> None:
    words = [f"clients={clients}", f"launch.workers={workers}", f"sharding={sharding}"]
    # The deadline is longer than the test may take: no barrier is waited out.
    words += ["train.local_steps=2", "policy.deadline_s=3600", "data.held_out=0.5"]
    run = spec_for(tmp_path, *words)
    (stats,) = federate(run).rounds()
    assert (stats.clients, stats.failed) == (clients, 0)
    assert stats.version >= 2


def test_too_many_clients_for_the_text_is_one_error_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="allow at most 36 clients, 50 asked for"):
        federate(spec_for(tmp_path, "clients=50", "sharding=natural"))


# --- clients that fail, die or are strangers ----------------------------------------------------


def test_a_client_that_fails_is_back_in_the_next_round(tmp_path: Path) -> None:
    def train(message: Message, context: Context, go_on: GoOn) -> Message:
        if partition(context) == 1 and round_of(message) == 1:
            raise OSError("disk full")
        return go_on()

    run = spec_for(tmp_path, "train.rounds=2", "train.local_steps=2", "policy.deadline_s=1")
    rounds = federate(run, client_that(train=train)).rounds()
    assert [(stats.clients, stats.failed) for stats in rounds] == [(2, 1), (3, 0)]
    assert [stats.version for stats in rounds] == [2, 4]


class Relay:
    """A service in front of a trunk that passes one step on, and lets nothing after it through."""

    trunks: Mapping[str, Future[None]] = {}

    def __init__(self, trunk: Link, until: Callable[[], object]) -> None:
        self._trunk, self._until = trunk, until
        self._has_stepped = False

    def check_token(self, token: str) -> str:
        """The trunk's own business."""
        return ""

    def disconnected(self, session: str) -> None:
        """The trunk is not told."""

    def handle(self, request: m.Request[m.R], token: str) -> m.R:
        if self._has_stepped and isinstance(request, m.ForwardRequest):
            self._until()
            raise BadTensor("was silent until now")
        reply = self._trunk.exchange(request)
        self._has_stepped |= isinstance(request, m.StepRequest)
        return reply


@contextmanager
def relayed(message: Message, until: Callable[[], object]) -> Iterator[None]:
    """A block in which a message's client finds a relay where the trunk's address was."""
    told, wire = message.content["fedsplit"], WireSpec()
    with closing(GrpcLink(told["address"], token=told["token"], wire=wire)) as trunk:
        limits = trunk.exchange(m.ServiceInfoRequest()).limits
        relay = GrpcServer(Relay(trunk, until), wire=wire, limits=limits, max_clients=1)
        told["address"] = relay.start()
        try:
            yield
        finally:
            relay.stop(grace_s=5.0)


def test_a_client_that_falls_silent_in_a_round_holds_the_others_up_to_the_deadline(
    tmp_path: Path,
) -> None:
    """Its process is still there, its session open, but after a step nothing comes from it."""
    others_done = threading.Barrier(3)  # the two others, and the silent one at last

    def train(message: Message, context: Context, go_on: GoOn) -> Message:
        if partition(context) == 0:
            with relayed(message, lambda: others_done.wait(timeout=60)):
                return go_on()
        reply = go_on()
        others_done.wait(timeout=60)
        return reply

    run = spec_for(tmp_path, "train.local_steps=4", "policy.deadline_s=1")
    (stats,) = federate(run, client_that(train=train)).rounds()
    assert (stats.clients, stats.failed) == (2, 1)
    assert stats.version == 4


def test_if_no_client_finishes_the_run_says_why_and_nothing_stays(tmp_path: Path) -> None:
    def train(message: Message, context: Context, go_on: GoOn) -> Message:
        raise OSError("disk full")

    before = {thread.name for thread in threading.enumerate()}
    with pytest.raises(Diverged, match="none of 3 clients finished.*OSError: disk full"):
        federate(spec_for(tmp_path), client_that(train=train))
    left = {thread.name for thread in threading.enumerate()} - before
    assert [name for name in left if "fedsplit" in name or "engine" in name] == []


def test_a_client_of_another_configuration_is_refused_before_any_work(tmp_path: Path) -> None:
    ours, theirs = spec_for(tmp_path), spec_for(tmp_path, "seed=9")
    stranger = ClientApp()

    @stranger.query("hello")
    def hello_of_another_run(message: Message, context: Context) -> Message:
        return hello(message, replace(context, run_config=run_config(theirs)))

    with pytest.raises(ModelMismatch, match="start both from the same code") as caught:
        federate(ours, stranger)
    assert f"runs configuration {theirs.fingerprint}" in str(caught.value)
    assert f"the server {ours.fingerprint} (seed is 9 at the client and 0 at" in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "kind", "message"),
    [
        (2, DeadlineExceeded, "2 of clients=3 are connected after 1 s; start 1 more, or lower"),
        (
            4,
            ConfigError,
            r"this node is partition \d of 4, but the run has clients=3; start it with",
        ),
    ],
    ids=["too few", "too many"],
)
def test_a_wrong_number_of_nodes_is_refused(
    tmp_path: Path, nodes: int, kind: type[FedsplitError], message: str
) -> None:
    run = spec_for(tmp_path, "launch.start_timeout_s=1")
    with pytest.raises(kind, match=message):
        run_inline(server, product, num_clients=nodes, run_config=run_config(run))


def test_every_way_to_say_it_gives_the_same_fingerprint() -> None:
    told = compose(["experiment=toy", "train.rounds=3", "lora=on"])
    keys = from_run_config({"experiment": "toy", "rounds": 3, "lora": "on", "model": ""})
    words = from_run_config({"overrides": "experiment=toy train.rounds=3 lora=on"})
    text = from_run_config({"config": to_yaml(told), "run-dir": "/elsewhere"})
    assert {run.fingerprint for run in (told, keys, words, text)} == {told.fingerprint}
    assert told.fingerprint != RunSpec().fingerprint
