"""A client that is missing in a round: the run goes on without it, or repeats the round with it."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Context, Error, Message, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedsplit.errors import ConfigError, DeadlineExceeded, Diverged
from fedsplit.flower import client_app, server_app
from fedsplit.flower.inline import (
    InlineGrid,
    _context,
    _identify_this_process,
    _Node,
    _nodes,
    run_inline,
)
from fedsplit.flower.strategy.going_back import Repeats
from fedsplit.flower.strategy.invitations import Invitations
from fedsplit.flower.strategy.nodes import GridView, NodeRegistry
from fedsplit.flower.strategy.round_metrics import RoundMetrics
from fedsplit.runs.folder import RunFolder
from fedsplit.spec import LaunchSpec, PolicySpec, RunSpec, TrainSpec
from tests.edge.federation import (
    client_that,
    federate,
    joined,
    run_config,
    spec_for,
    without_seconds,
)
from tests.edge.resuming import folder_of

WORDS = ("train.rounds=3", "train.local_steps=2", "lora=on", "lora.rank=2", "lora.dropout=0.5")


class Lost:
    """Work of a client in round 2 that is lost so many times, before it was done or after."""

    def __init__(self, times: int, *, after: bool, client: str = "client-1") -> None:
        self._client = client
        self._left = times
        self._after = after
        self._lock = threading.Lock()

    def __call__(self, message: Message, context: Context, go_on: Callable[[], Message]) -> Message:
        info = message.content.config_records["fedsplit"]
        with self._lock:
            is_lost = info["client"] == self._client and info["round"] == 2 and self._left > 0
            self._left -= is_lost
        if not is_lost:
            return go_on()
        if self._after:
            go_on()
        error = Error(code=ErrorCode.NODE_UNAVAILABLE, reason="the node is gone")
        return Message(error, reply_to=message)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return federate(spec_for(tmp_path_factory.mktemp("whole"), *WORDS))


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_run_that_waits_has_the_numbers_of_one_without_a_loss(
    tmp_path: Path, whole: RunFolder, kind: str, after: bool
) -> None:
    run = spec_for(tmp_path, *WORDS, "policy.missing=wait")
    folder = federate(run, client_that(**{kind: Lost(2, after=after)}))
    rounds = folder.rounds()
    assert [stats.repeats for stats in rounds] == [0, 2, 0]
    assert "2 repetitions" in rounds[1].line
    numbers = [replace(stats, repeats=0) for stats in without_seconds(rounds)]
    assert numbers == without_seconds(whole.rounds())
    weights = joined(whole)
    assert all(tensor.equal(weights[name]) for name, tensor in joined(folder).items())


def test_a_damaged_checkpoint_is_passed_over_while_the_run_goes_on(
    tmp_path: Path, whole: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    run = spec_for(tmp_path, *WORDS, "policy.missing=wait")
    newest = Path(run.launch.run_dir, run.name, "checkpoints", "round-0001")
    lost = Lost(1, after=False)

    def train(message: Message, context: Context, go_on: Callable[[], Message]) -> Message:
        if (reply := lost(message, context, go_on)).has_error():
            (newest / "trunk.safetensors").write_bytes(b"")
        return reply

    folder = federate(run, client_that(train=train))
    assert f"{newest}/trunk.safetensors is missing or damaged" in caplog.text
    assert "training goes back to round 0" in caplog.text
    numbers = [replace(stats, repeats=0) for stats in without_seconds(folder.rounds())]
    assert numbers == without_seconds(whole.rounds())


def test_a_client_that_stays_away_is_left_out_of_the_round(tmp_path: Path) -> None:
    run = spec_for(tmp_path, *WORDS, "policy.missing=wait")
    rounds = federate(run, client_that(train=Lost(4, after=False))).rounds()
    assert [(stats.repeats, stats.failed) for stats in rounds] == [(0, 0), (3, 1), (0, 0)]


@pytest.mark.parametrize("policy", ["sync", "async"])
def test_a_round_whose_clients_are_all_gone_is_repeated(tmp_path: Path, policy: str) -> None:
    run = spec_for(tmp_path, *WORDS, "clients=1", f"policy={policy}")
    rounds = federate(run, client_that(train=Lost(2, after=True, client="client-0"))).rounds()
    assert [(stats.repeats, stats.failed) for stats in rounds] == [(0, 0), (2, 0), (0, 0)]


def test_a_run_whose_clients_always_crash_ends_though_each_round_has_some_of_them(
    tmp_path: Path,
) -> None:
    def train(message: Message, context: Context, go_on: Callable[[], Message]) -> Message:
        error = Error(code=ErrorCode.CLIENT_APP_CRASHED, reason="it has crashed")
        return Message(error, reply_to=message)

    words = ("clients=2", "client_weights.options={fraction_train: 0.5}", "train.evaluate_every=4")
    run = spec_for(tmp_path, *WORDS, *words, "train.rounds=4")
    with pytest.raises(Diverged, match=r"round 3, .* none of 1 clients finished; .* has crashed"):
        federate(run, client_that(train=train))


def test_a_run_that_drops_it_goes_on_at_once(tmp_path: Path) -> None:
    run = spec_for(tmp_path, *WORDS)
    rounds = federate(run, client_that(train=Lost(1, after=True))).rounds()
    assert [(stats.repeats, stats.failed) for stats in rounds] == [(0, 0), (0, 1), (0, 0)]


def test_a_client_that_leaves_after_its_training_is_waited_for(
    tmp_path: Path, whole: RunFolder
) -> None:
    away: list[int] = []

    def train(message: Message, context: Context, go_on: Callable[[], Message]) -> Message:
        reply, info = go_on(), message.content.config_records["fedsplit"]
        if (info["client"], info["round"]) == ("client-1", 2) and not away:
            away.append(context.node_id)
        return reply

    def evaluate(message: Message, context: Context, go_on: Callable[[], Message]) -> Message:
        if away:  # Chosen without the other client, which is back now and does not leave again.
            away[0] = 0
        return go_on()

    def serve(grid: Grid, context: Context) -> None:
        def present() -> list[int]:
            return [node for node in grid.get_node_ids() if node not in away]

        server_app.app(GridView(grid, present, patience_s=600), context)

    run = spec_for(tmp_path, *WORDS, "policy.missing=wait")
    client = client_that(train=train, evaluate=evaluate)
    run_inline(serve, client, num_clients=3, run_config=run_config(run))
    rounds = folder_of(run).rounds()
    assert [stats.repeats for stats in rounds] == [0, 1, 0]
    numbers = [replace(stats, repeats=0) for stats in without_seconds(rounds)]
    assert numbers == without_seconds(whole.rounds())


@pytest.mark.slow
@pytest.mark.parametrize("has_state", [True, False])
def test_a_client_that_comes_back_as_another_node_is_known_by_its_state(
    tmp_path: Path, whole: RunFolder, has_state: bool
) -> None:
    new_node, died, over = 99, threading.Event(), threading.Event()
    app = ClientApp()
    app.train()(client_app.train)

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        reply = client_app.hello(message, context)
        if context.node_id == new_node and not has_state:
            reply.content["hello"]["states"] = [12345]
            # Nothing else tells that the first node will not answer; here it does, later.
            threading.Timer(1.0, over.set).start()
        return reply

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        info = message.content.config_records["fedsplit"]
        if (info["client"], info["round"]) == ("client-1", 2) and context.node_id != new_node:
            died.set()
            over.wait(120)  # a run that never notices fails, and does not hang
        return client_app.evaluate(message, context)

    run = spec_for(tmp_path, *WORDS, "policy.missing=wait")
    config = run_config(run)
    nodes = _nodes(app, 3, 1, config)
    partition: UserConfig = {"partition-id": 1, "num-partitions": 3, "trust-runs": True}
    nodes[new_node] = _Node(app, _context(1, config, new_node, partition))
    _identify_this_process()
    with ThreadPoolExecutor(4) as pool:
        grid = InlineGrid(1, nodes, pool)

        def present() -> list[int]:
            return [node for node in grid.get_node_ids() if node != new_node or died.is_set()]

        server_app.app(GridView(grid, present, patience_s=600), _context(1, config))
        over.set()
    rounds = folder_of(run).rounds()
    assert [stats.repeats for stats in rounds] == [0, int(has_state), 0]
    numbers = [replace(stats, repeats=0) for stats in without_seconds(rounds)]
    assert numbers == without_seconds(whole.rounds())


def test_waiting_for_all_clients_may_take_longer_than_for_the_first() -> None:
    run = RunSpec(launch=LaunchSpec(start_timeout_s=0.01))
    with ThreadPoolExecutor(1) as pool:
        registry = NodeRegistry(InlineGrid(1, {}, pool), run, Invitations(run, "", ()))
        assert not registry.wait_for_all(0.1)
        with pytest.raises(DeadlineExceeded, match="0 of clients="):
            registry.present()


def test_each_round_since_an_older_checkpoint_is_repeated_at_most_three_times() -> None:
    repeats, lost = Repeats(PolicySpec(missing="wait")), RoundMetrics(missing={"client-1"})
    rounds = [2, 2, 2, 2, 3, 2, 3, 2, 3, 2, 3]
    is_repeated = [repeats.setback_in(number, lost, 0) is not None for number in rounds]
    assert is_repeated == [True] * 3 + [False] + [True, False] * 3 + [False]
    assert (repeats.of(1), repeats.of(2), repeats.of(3)) == (0, 3, 3)


@pytest.mark.parametrize("policy", ["quorum", "async"])
def test_policies_that_do_not_wait_refuse_to(policy: str) -> None:
    with pytest.raises(ConfigError, match=f"policy={policy} does not; use policy.missing=drop"):
        PolicySpec(kind=policy, missing="wait")


def test_waiting_needs_checkpoints() -> None:
    with pytest.raises(ConfigError, match="train.save_every=0 there is none; set train.save_ev"):
        RunSpec(policy=PolicySpec(missing="wait"), train=TrainSpec(save_every=0))
