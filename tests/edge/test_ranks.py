"""A trunk on two ranks: served, trained, saved, and ended with one of them."""

import copy
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import grpc
import psutil
import pytest
import torch
from transformers import LlamaForCausalLM

from fedsplit.client.trainer import ClientTrainer
from fedsplit.config import compose
from fedsplit.errors import ConfigError
from fedsplit.flower import client_app
from fedsplit.flower.inline import run_inline
from fedsplit.flower.server_app import app_with
from fedsplit.runs.folder import RunFolder
from fedsplit.serve import hosted, plan, reach, trunks_of
from fedsplit.serve.peers import Peers
from fedsplit.spec import WireSpec
from fedsplit.telemetry.events import Contributed, StepTaken
from fedsplit.telemetry.sinks import Sink
from tests.core.worlds import batch
from tests.edge.federation import federate, joined, largest_difference, run_config, spec_for
from tests.edge.forked import Program
from tests.edge.health import NOT_SERVING, health_of
from tests.edge.resuming import interrupted, resumed

SGD = ("train.optimizer=sgd", "train.lr=0.1", "train.schedule=constant", "train.warmup_steps=0")
SIZES = (
    "{num_hidden_layers:4,hidden_size:16,intermediate_size:32,num_attention_heads:2,"
    "num_key_value_heads:2}"
)


@pytest.fixture
def model(tiny_llama, tmp_path):
    torch.manual_seed(0)
    made = LlamaForCausalLM(tiny_llama(num_key_value_heads=2)).eval()
    made.save_pretrained(tmp_path / "model")
    return made


def address_in(ready):
    return re.search(r"at (127\.0\.0\.1:\d+);", ready)[1]


@pytest.mark.slow
def test_a_server_on_two_ranks_trains_saves_and_ends_with_a_rank(model, tmp_path):
    source, run, example = str(tmp_path / "model"), compose(["split=1/2/1", *SGD]), batch(1)
    words = ["--model", source, "--split", "1/2/1", "--bind", "127.0.0.1:0", "--tp", "2"]
    words += ["--state-dir", tmp_path / "states", *SGD]
    with Program("fedsplit", "serve", *words) as server:
        address = address_in(server.stdout.readline())
        first = psutil.Process(server.pid)
        ports = [port for each in (first, *first.children()) for port in each.net_connections()]
        hosts = [port.laddr.ip for port in ports if port.status == "LISTEN"]
        assert hosts and all(host.endswith("127.0.0.1") for host in hosts)
        with reach(source, address, run=run) as reached:
            with reached.trunk.session():
                ClientTrainer(reached.model, reached.trunk, run).step([example])
        server.send_signal(signal.SIGTERM)
        assert server.end()[::2] == (0, "")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**example.inputs, labels=example.labels).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), run.train.clip_norm)
    optimizer.step()
    with Program("fedsplit", "serve", *words) as server:
        ready = server.stdout.readline()
        assert "at version 1 " in ready
        address = address_in(ready)
        with reach(source, address) as reached, torch.no_grad():
            held = dict(model.named_parameters())
            for name, parameter in reached.model.named_parameters():
                parameter.copy_(held[name])
            ids_BT = example.inputs["input_ids"][:1]
            asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
            expected_BT = model.generate(ids_BT, **asked)
            assert torch.equal(reached.model.generate(ids_BT, **asked), expected_BT)
            # Each rank copies its own heads of a cache.
            cache = reached.model.new_cache()
            reached.model(ids_BT[:, :-2], past_key_values=cache)
            asked["past_key_values"] = copy.deepcopy(cache)
            assert torch.equal(reached.model.generate(ids_BT, **asked), expected_BT)
        (other,) = psutil.Process(server.pid).children()
        other.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        assert NOT_SERVING in health_until_the_end(address)
        code, _, errors = server.end()
    assert time.monotonic() - killed < 10
    assert code == 1
    assert errors.splitlines() == [
        "error: rank 1 has ended with status -9; this trunk runs on 2 ranks, and all of them end"
    ]


@pytest.mark.slow
def test_a_rank_ends_whose_rank_0_has_ended_before_it_began():
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    program = "from fedsplit.ranks.group import ranks_of\nwith ranks_of(2, []): pass"
    other = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **place, "FEDSPLIT_RANK_0": str(gone.pid)},
        timeout=60,
    )
    assert other.returncode == 1


@pytest.mark.slow
def test_rank_0_ends_if_another_rank_cannot_begin():
    program = (
        "import sys; from fedsplit.ranks.group import ranks_of\n"
        "with ranks_of(2, [sys.executable, '-c', 'raise SystemExit(3)']): pass"
    )
    first = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert first.returncode == 1
    assert b"rank 1 has ended with status 3 before it was connected" in first.stderr


def health_until_the_end(address):
    found = set()
    try:
        while True:
            found |= set(health_of(address, ""))
            time.sleep(0.05)
    except grpc.RpcError:
        return found


@pytest.mark.slow
def test_a_follower_on_two_ranks_serves_a_client_of_a_leader_in_one_process(model, tmp_path):
    source, words = str(tmp_path / "model"), ["split=1/2/1", "clients=2", *SGD]
    run, wire = compose(words), WireSpec(bind="127.0.0.1:0")
    (tmp_path / "peers").write_text("of-the-servers")
    with hosted(plan([source], []), run, wire) as alone:
        expected = trained(source, run, alone, alone)
    with hosted(plan([source], []), run, wire, peers=Peers(token="of-the-servers")) as leader:
        options = ["--model", source, "--bind", "127.0.0.1:0", "--tp", "2", "--leader", leader]
        options += ["--peers-token-file", str(tmp_path / "peers"), *words]
        with Program("fedsplit", "serve", *options) as follower:
            address = address_in(follower.stdout.readline())
            weights = trained(source, run, leader, address)
            (other,) = psutil.Process(follower.pid).children()
            other.send_signal(signal.SIGKILL)
            code, _, errors = follower.end()
        assert (code, len(errors.splitlines())) == (1, 1)
        assert "rank 1 has ended with status -9" in errors
        # Its client goes on at the leader.
        trained(source, run, leader, leader)
    assert max((weights[k] - v).abs().max().item() for k, v in expected.items()) < 1e-5


def trained(source, run, *addresses):
    """The weights of two clients after two steps together, each at its server."""
    with ExitStack() as opened, ThreadPoolExecutor() as pool:
        clients = [
            opened.enter_context(reach(source, address, run=run, client=name))
            for address, name in zip(addresses, ("alice", "bob"), strict=True)
        ]
        for each in clients:
            each.trunk.open()  # so that the first step waits for both
        trainers = [ClientTrainer(each.model, each.trunk, run) for each in clients]
        groups = [[[batch(2 * place + i)] for i in range(2)] for place in range(2)]
        assert [done.steps for done in pool.map(ClientTrainer.fit, trainers, groups)] == [2, 2]
        return {
            f"{place}/{name}": tensor.clone()
            for place, each in enumerate(clients)
            for name, tensor in each.model.state_dict().items()
        }


RUN = (
    "model.family=llama",
    f"model.config={SIZES}",
    "train.rounds=2",
    "train.save_every=1",
)


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory):
    return joined(federate(spec_for(tmp_path_factory.mktemp("one"), *RUN)))


@pytest.mark.parametrize("before, after", [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_run_continues_on_another_number_of_ranks(tmp_path, in_one_process, before, after):
    run = spec_for(tmp_path, *RUN, f"launch.trunk_tp={before}")
    interrupted(run, 2)
    went_on = resumed(replace(run, launch=replace(run.launch, trunk_tp=after)))
    assert [stats.round for stats in went_on.rounds()] == [1, 2]
    assert largest_difference(in_one_process, joined(went_on)) < 1e-5
    others = [" ".join(each.cmdline()) for each in psutil.Process().children()]
    assert not any("fedsplit.flower.rank" in command for command in others)


def test_ranks_share_one_trunk(tmp_path):
    served = plan(["a=here", "b=there"], [])
    with pytest.raises(ConfigError, match="2 trunks were asked for, but ranks compute one"):
        next(trunks_of(served, compose([]), ranks=2))


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("launch.trunk_device=cuda:1", "does not go with launch.trunk_device=cuda:1"),
        ("train.optimizer=adamw_8bit", "does not go with train.optimizer=adamw_8bit"),
        ("train.compile_trunk=default", "does not go with train.compile_trunk=default"),
    ],
)
def test_settings_that_ranks_do_not_go_with_are_refused(word, told):
    with pytest.raises(ConfigError, match=f"launch.trunk_tp cuts the trunk.*{told}"):
        compose(["launch.trunk_tp=2", word])


def test_quantized_weights_are_refused():
    told = "launch.trunk_tp=2 cuts plain weights over several ranks, but model.quantize=nf4 packs"
    with pytest.raises(ConfigError, match=told):
        compose(["launch.trunk_tp=2", "model.quantize=nf4", "lora.enabled=true"])


class RankKiller(Sink):
    """Kills a rank of the follower while the second step is incomplete."""

    def __init__(self):
        self.steps = 0
        self.killed = []

    def on_event(self, event):
        self.steps += isinstance(event, StepTaken)
        # The follower has the other client, whose work is lost.
        if self.steps == 1 and isinstance(event, Contributed) and event.client == "client-0":
            (follower,) = programs("fedsplit.flower.followers")
            (rank,) = follower.children()
            rank.kill()
            self.killed.append(rank.pid)


def programs(name):
    """The children of this process that run a module."""
    return [each for each in psutil.Process().children() if name in each.cmdline()]


@pytest.mark.slow
def test_two_servers_on_two_ranks_each_train_as_one_and_lose_a_rank_of_the_follower(tmp_path):
    words = (*RUN, "clients=2", "train.local_steps=4", "launch.trunk_tp=2")
    expected = joined(federate(spec_for(tmp_path / "one", *words)))
    run = spec_for(tmp_path / "two", *words, "launch.trunk_servers=2")
    killer = RankKiller()
    run_inline(
        app_with(killer), client_app.app, num_clients=2, run_config=run_config(run), workers=0
    )
    (path,) = Path(run.launch.run_dir).iterdir()
    weights = joined(RunFolder(path))
    assert len(killer.killed) == 1
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert not programs("fedsplit.flower.followers") + programs("fedsplit.flower.rank")
