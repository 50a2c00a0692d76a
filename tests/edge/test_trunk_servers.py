"""Several trunk servers of one run: the weights are those of one, whatever ends meanwhile."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fedsplit.client.trainer import ClientTrainer
from fedsplit.config import compose
from fedsplit.errors import ConfigError, Unauthenticated
from fedsplit.flower import client_app
from fedsplit.flower.inline import run_inline
from fedsplit.flower.server_app import app_with
from fedsplit.runs.folder import RunFolder
from fedsplit.serve import Served, hosted, reach
from fedsplit.serve.peers import Peers
from fedsplit.spec import WireSpec
from fedsplit.telemetry.events import Contributed, Event, StepTaken
from fedsplit.telemetry.sinks import Sink
from fedsplit.trunk.update import TrunkUpdate
from strategies.splitfed_v1 import ReplicaUpdate
from tests.core.worlds import batch
from tests.edge.federation import federate, joined, run_config, spec_for

STEPS = ("train.local_steps=4", "train.clip_norm=1.0")


class Killer(Sink):
    """Kills a follower while the step after the first one is incomplete, and another one later.

    The first one loses the work of its client. The second one has sent its client's contribution,
    and cannot pass on the reply.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.left: list[psutil.Process] = []
        self.killed: list[str] = []

    def on_event(self, event: Event) -> None:
        self.steps += isinstance(event, StepTaken)
        if not isinstance(event, Contributed):
            return
        if (self.steps, event.client) in ((1, "client-0"), (2, "client-2")):
            # The first one is the server of client-1, and the second one that of client-2.
            self.left = self.left or followers()
            self.left.pop(0).kill()
            self.killed.append(event.client)


def followers() -> list[psutil.Process]:
    """The followers of this process, the oldest first."""
    children = sorted(psutil.Process().children(), key=psutil.Process.create_time)
    return [each for each in children if "fedsplit.flower.followers" in each.cmdline()]


def test_two_followers_are_killed_in_the_middle_of_steps_and_no_weight_changes(tmp_path: Path):
    alone = federate(spec_for(tmp_path / "one", *STEPS))
    run = spec_for(tmp_path / "three", *STEPS, "launch.trunk_servers=3")
    killer = Killer()
    run_inline(
        app_with(killer), client_app.app, num_clients=3, run_config=run_config(run), workers=0
    )
    (path,) = Path(run.launch.run_dir).iterdir()
    weights, expected = joined(RunFolder(path)), joined(alone)
    assert killer.killed == ["client-0", "client-2"]
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert not followers()


# --- served trunks --------------------------------------------------------------------------------

RUN = compose(
    "split=1/2/1 train.lr=0.01 train.warmup_steps=0 train.batch_size=2 data.sequence_length=12 "
    "clients=2".split()
)
WIRE = WireSpec(bind="127.0.0.1:0")
ALICE, BOB = [[batch(i)] for i in range(3)], [[batch(10 + i)] for i in range(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("served") / "model"
    torch.manual_seed(0)
    sizes = dict(n_layer=4, n_embd=16, n_head=2, vocab_size=64, n_positions=16)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder)
    return str(folder)


def trained(model: str, *addresses: str) -> dict[str, torch.Tensor]:
    """The weights of two clients that train together, each at its server."""
    with ExitStack() as opened, ThreadPoolExecutor() as pool:
        clients = [
            opened.enter_context(reach(model, at, token="c", run=RUN, client=name))
            for at, name in zip(addresses, ("alice", "bob"), strict=True)
        ]
        for each in clients:
            each.trunk.open()  # so that the first step waits for both
        trainers = [ClientTrainer(each.model, each.trunk, RUN) for each in clients]
        for steps in pool.map(lambda one, groups: one.fit(groups).steps, trainers, (ALICE, BOB)):
            assert steps == 3
        return {
            f"{place}/{name}": tensor
            for place, each in enumerate(clients)
            for name, tensor in each.model.state_dict().items()
        }


def test_clients_of_a_leader_and_of_its_follower_train_one_served_trunk(model: str) -> None:
    served = [Served(name="base", model=model)]
    with hosted(served, RUN, WIRE, token="c") as alone:
        expected = trained(model, alone, alone)
    with (
        hosted(served, RUN, WIRE, token="c", peers=Peers(token="p")) as leader,
        hosted(served, RUN, WIRE, token="c", peers=Peers(token="p", leader=leader)) as follower,
    ):
        weights = trained(model, leader, follower)
        with pytest.raises(Unauthenticated):
            with hosted(served, RUN, WIRE, peers=Peers(token="c", leader=leader)):
                pass
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("peers", "words", "is_saved", "text"),
    [
        pytest.param(Peers(leader="a:1"), [], False, "give the token that both", id="token"),
        pytest.param(Peers(leader="a:1", token="p"), [], True, "give --state-dir to", id="state"),
        pytest.param(
            Peers(token="p"), ["policy=async"], False, "policy=async does not", id="async"
        ),
    ],
)
def test_what_servers_cannot_share_is_refused(
    peers: Peers, words: list[str], is_saved: bool, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        peers.check(compose(words), TrunkUpdate, is_saved=is_saved)


def test_updates_with_trunks_of_their_own_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="strategy=splitfed_v2"):
        Peers(token="p").check(RUN, ReplicaUpdate, is_saved=False)
    with pytest.raises(ConfigError, match="launch.trunk_servers=2 shares the steps of one trunk"):
        federate(spec_for(tmp_path, "strategy=splitfed_v1", "launch.trunk_servers=2"))


def test_the_token_of_the_clients_is_not_that_of_the_servers() -> None:
    with pytest.raises(ConfigError, match="with which each client would be a server"):
        Peers(token="t").check(RUN, TrunkUpdate, is_saved=False, clients_token="t")
