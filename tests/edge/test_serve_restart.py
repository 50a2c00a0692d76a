"""`fedsplit serve` with trunks that train: killed, stopped or damaged, the weights are the same.

The server is a process that is started again at its address, as a supervisor does. Two clients
train with dropout in threads of the test.
"""

import re
import shutil
import signal
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.config import compose
from fedsplit.errors import (
    CheckpointError,
    ConfigError,
    ConnectionLost,
    ServerRestarted,
    StorageError,
)
from fedsplit.link import Link
from fedsplit.model import connect
from fedsplit.serve import Reached, Served, StateFolder, TrunkStates, hosted, reach
from fedsplit.spec import RunSpec, WireSpec
from fedsplit.wire import messages as m
from tests.core.worlds import batch, wait_until
from tests.edge.forked import Program

RUN = compose(
    "split=1/2/1 train.lr=0.01 train.warmup_steps=0 train.batch_size=2 data.sequence_length=12 "
    "wire.budget_s=60".split()
)
FIELDS = ["train.lr=0.01", "train.warmup_steps=0", "train.batch_size=2", "data.sequence_length=12"]
EVERY, STEPS, NAMES = 4, 11, ("alice", "bob")

Weights = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "model"
    torch.manual_seed(0)
    sizes = dict(n_layer=4, n_embd=16, n_head=2, vocab_size=64, n_positions=16)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder)
    return folder


@dataclass
class Server:
    """A server that is started again; `versions` are those that its ready lines name."""

    model: Path
    state: Path
    address: str = ""
    versions: list[int] = field(default_factory=list)
    program: Program | None = None

    def start(self) -> None:
        if not self.address:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        words = ["--model", f"base={self.model}", "--split", "1/2/1", "--bind", self.address]
        words += ["--state-dir", self.state, "--save-every", EVERY, *FIELDS]
        self.program = Program("fedsplit", "serve", *words)
        ready = self.program.stdout.readline()
        named = re.match(r"serving base(?: at version (\d+))? \(cut", ready)
        assert named, self.program.end(5.0)
        self.versions.append(int(named[1] or 0))

    def again(self, number: int) -> None:
        """End the process by a signal, and start another one."""
        self.program.send_signal(number)
        self.program.end(30.0)
        self.start()

    def trunk(self, number: int = -1) -> Path:
        """The file with the trunk of a saved state."""
        return sorted((self.state / "base").glob("round-*"))[number] / "trunk.safetensors"


class DisturbedLink(Link):
    """A link that does something before a request, or after it, when the reply is lost."""

    def __init__(self, link: Link, disturbances: Mapping[tuple[str, type, int], Callable]) -> None:
        self._link = link
        self._disturbances = disturbances
        self._counts: dict[type, int] = {}

    def exchange(self, request: m.Request[m.R]) -> m.R:
        kind = type(request)
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        self._disturbances.get(("before", kind, count), lambda: None)()
        reply = self._link.exchange(request)
        if disturb := self._disturbances.get(("lost", kind, count)):
            disturb()
            raise ConnectionLost("the reply was lost")
        return reply

    def close(self) -> None:
        self._link.close()


def trained(server: Server, folder: Path, disturbances: Mapping = {}) -> Weights:  # noqa: B006
    """The weights of both clients and the trunk; alice's link is disturbed."""
    server.start()
    clients: dict[str, Reached] = {}
    for name in NAMES:
        reached = reach(str(server.model), server.address, run=RUN, client=name)
        link = DisturbedLink(reached.link, disturbances if name == "alice" else {})
        trunk = RemoteTrunk(link, reached.model, RUN, client=name)
        connect(reached.model, trunk)
        trunk.open()  # so that the first step waits for both
        clients[name] = replace(reached, trunk=trunk)

    def fit(name: str) -> dict[str, Tensor]:
        with clients[name] as reached:
            trainer = ClientTrainer(reached.model, reached.trunk, RUN)
            groups = [[batch(100 * NAMES.index(name) + i)] for i in range(STEPS)]
            assert trainer.fit(groups, states=StateFolder(folder / name, RUN, name)).steps == STEPS
            return reached.model.state_dict()

    with ThreadPoolExecutor() as pool:
        weights = dict(zip(NAMES, pool.map(fit, NAMES), strict=True))
    server.program.send_signal(signal.SIGTERM)
    assert server.program.end(30.0)[0] == 0
    trunk = load_file(server.trunk())
    assert trunk["trunk/version"] == STEPS
    return {**weights, "trunk": {k: v for k, v in trunk.items() if "parameter/" in k}}


def assert_same(got: Weights, expected: Weights) -> None:
    for side, weights in expected.items():
        for name, tensor in weights.items():
            assert torch.equal(got[side][name], tensor), (side, name)


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory) -> Weights:
    folder = tmp_path_factory.mktemp("undisturbed")
    return trained(Server(model, folder / "state"), folder)


@pytest.mark.slow
def test_a_server_killed_in_every_phase_changes_no_weight(model, undisturbed, tmp_path):
    server = Server(model, tmp_path / "state")

    def kill() -> None:
        server.again(signal.SIGKILL)

    kills = {
        ("before", m.ForwardRequest, 3): kill,  # no state was saved yet
        ("lost", m.StepRequest, 8): kill,
        ("before", m.BackwardRequest, 11): kill,
        ("before", m.StepRequest, 11): kill,  # while the step is repeated
    }
    assert_same(trained(server, tmp_path, kills), undisturbed)
    assert len(server.versions) == 5 and server.versions[:2] == [0, 0]
    assert set(server.versions[2:]) <= {EVERY, 2 * EVERY}
    assert len(list((tmp_path / "state" / "base").glob("round-*"))) == 2
    assert len(list((tmp_path / "alice").glob("round-*"))) <= 4


def test_a_server_that_is_stopped_goes_on_where_it_was(model, undisturbed, tmp_path, caplog):
    server = Server(model, tmp_path / "state")
    # Alice has contributed to the step, so the server waits for bob, and her reply is lost.
    stops = {("lost", m.StepRequest, 7): lambda: server.again(signal.SIGTERM)}
    assert_same(trained(server, tmp_path, stops), undisturbed)
    assert server.versions == [0, 7]
    assert "goes back to version" not in caplog.text


def test_a_damaged_state_is_passed_over(model, undisturbed, tmp_path, caplog):
    server = Server(model, tmp_path / "state")

    def damage_and_kill() -> None:
        # States are written in the background.
        wait_until(lambda: len(list((tmp_path / "state" / "base").glob("round-*"))) == 2)
        shutil.copy(server.trunk(0), server.trunk())
        server.again(signal.SIGKILL)

    kills = {("before", m.ForwardRequest, 10): damage_and_kill}
    assert_same(trained(server, tmp_path, kills), undisturbed)
    assert server.versions == [0, EVERY]
    assert caplog.text.count(f"goes back to version {EVERY}") == 2


# --- in one process -----------------------------------------------------------------------------


@contextmanager
def serving(model: Path, state: Path, bind: str = "127.0.0.1:0", run: RunSpec = RUN):
    """A server that saves its trunk every two steps; gives its address."""
    served = [Served(name="base", model=str(model))]
    with TrunkStates(state, 2) as states:
        with hosted(served, run, WireSpec(bind=bind), states=states) as address:
            yield address


@contextmanager
def alice(model: Path, address: str, disturbances: Mapping = {}, name="alice"):  # noqa: B006
    """A client, and its trainer."""
    with reach(str(model), address, run=RUN, client=name) as reached:
        link = DisturbedLink(reached.link, disturbances)
        trunk = RemoteTrunk(link, reached.model, RUN, client=name)
        connect(reached.model, trunk)
        yield trunk, ClientTrainer(reached.model, trunk, RUN)
        trunk.disconnect()


GROUPS = [[batch(i)] for i in range(5)]


def test_a_client_whose_steps_are_lost_is_told_both_versions(model, tmp_path):
    with ExitStack() as servers:
        address = servers.enter_context(serving(model, tmp_path / "state"))
        with alice(model, address) as (trunk, trainer):
            trainer.fit(GROUPS[:3])
            servers.close()
            shutil.rmtree(tmp_path / "state" / "base" / "round-0003")
            # She is away for a start at which bob trains, so the present version tells nothing.
            with serving(model, tmp_path / "state", bind=address):
                with alice(model, address, name="bob") as (_, others):
                    others.fit(GROUPS[:3])
            with serving(model, tmp_path / "state", bind=address):
                lost = "version 2 of the trunk, but the weights of alice belong to version 3; load"
                with pytest.raises(ServerRestarted, match=lost):
                    trunk.open()
                assert trunk.open() == 5  # the client has loaded its state


@pytest.mark.parametrize("what", ["removed", "damaged"])
def test_a_client_says_which_of_its_states_is_missing(what, model, tmp_path):
    own = tmp_path / "alice"

    def again() -> None:
        servers.close()
        shutil.rmtree(tmp_path / "state" / "base" / "round-0003")
        shutil.rmtree(own / "round-0002")
        if what == "damaged":
            (own / "round-0000" / "weights.safetensors").rename(own / "gone")
            shutil.rmtree(tmp_path / "state" / "base" / "round-0002")
        servers.enter_context(serving(model, tmp_path / "state", bind=address))

    told = {
        "removed": r"has states of the versions \[0\], and none of 2",
        "damaged": r"weights.safetensors is missing or damaged",
    }
    with ExitStack() as servers:
        address = servers.enter_context(serving(model, tmp_path / "state"))
        disturbances = {("before", m.ForwardRequest, 4): again}
        with alice(model, address, disturbances) as (_, trainer):
            with pytest.raises(ServerRestarted, match=told[what]):
                trainer.fit(GROUPS, states=StateFolder(own, RUN, "alice"))


def test_training_goes_on_where_no_state_can_be_written(model, tmp_path, caplog):
    states = StateFolder(tmp_path / "alice", RUN, "alice")
    with serving(model, tmp_path / "state") as address:
        for folder in (tmp_path / "state" / "base", tmp_path / "alice"):
            shutil.rmtree(folder)
            folder.write_text("in the way")
        with alice(model, address) as (trunk, trainer):
            with pytest.raises(StorageError, match="alice"):
                states.save(0, {}, {})
            assert trainer.fit(GROUPS, states=states).steps == len(GROUPS)
    assert "the trunk at version 2 is not saved" in caplog.text
    assert "the client's state of version 2 is not saved" in caplog.text


def test_a_server_takes_no_states_of_others(model, tmp_path):
    state = tmp_path / "state"
    with serving(model, state) as address, alice(model, address) as (_, trainer):
        trainer.fit(GROUPS)
        with pytest.raises(ConfigError, match="in use by another server"):
            TrunkStates(state, 2).__enter__()
    other = replace(RUN, train=replace(RUN.train, lr=7.0))
    with pytest.raises(ConfigError, match=r"train.lr was 0.01, is 7.0"):
        with serving(model, state, run=other):
            pass
    for file in state.glob("base/*/trunk.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no state of the trunk in .* can be used"):
        with serving(model, state):
            pass


def test_only_groups_that_can_be_had_again_are_saved_for(model, tmp_path):
    with serving(model, tmp_path / "state") as address, alice(model, address) as (_, trainer):
        with pytest.raises(ConfigError, match="give it a sequence, such as a list, and not a zip"):
            trainer.fit(zip(GROUPS), states=StateFolder(tmp_path / "alice", RUN, "alice"))
    with pytest.raises(ConfigError, match="save_every=0 must be 1 or more"):
        TrunkStates(tmp_path, 0)
