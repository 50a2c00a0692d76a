"""A client that is missing in a round: the run goes on without it, or repeats the round with it."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode

from fedsplit.errors import ConfigError
from fedsplit.runs.folder import RunFolder
from fedsplit.spec import PolicySpec, RunSpec, TrainSpec
from tests.edge.federation import client_that, federate, joined, spec_for, without_seconds

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


def test_a_client_that_stays_away_is_left_out_of_the_round(tmp_path: Path) -> None:
    run = spec_for(tmp_path, *WORDS, "policy.missing=wait")
    rounds = federate(run, client_that(train=Lost(4, after=False))).rounds()
    assert [(stats.repeats, stats.failed) for stats in rounds] == [(0, 0), (3, 1), (0, 0)]


@pytest.mark.parametrize("policy", ["sync", "async"])
def test_a_round_whose_clients_are_all_gone_is_repeated(tmp_path: Path, policy: str) -> None:
    run = spec_for(tmp_path, *WORDS, "clients=1", f"policy={policy}")
    rounds = federate(run, client_that(train=Lost(2, after=True, client="client-0"))).rounds()
    assert [(stats.repeats, stats.failed) for stats in rounds] == [(0, 0), (2, 0), (0, 0)]


def test_a_run_that_drops_it_goes_on_at_once(tmp_path: Path) -> None:
    run = spec_for(tmp_path, *WORDS)
    rounds = federate(run, client_that(train=Lost(1, after=True))).rounds()
    assert [(stats.repeats, stats.failed) for stats in rounds] == [(0, 0), (0, 1), (0, 0)]


@pytest.mark.parametrize("policy", ["quorum", "async"])
def test_policies_that_do_not_wait_refuse_to(policy: str) -> None:
    with pytest.raises(ConfigError, match=f"policy={policy} does not; use policy.missing=drop"):
        PolicySpec(kind=policy, missing="wait")


def test_waiting_needs_checkpoints() -> None:
    with pytest.raises(ConfigError, match="train.save_every=0 there is none; set train.save_ev"):
        RunSpec(policy=PolicySpec(missing="wait"), train=TrainSpec(save_every=0))
