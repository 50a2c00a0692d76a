"""A trunk on two ranks: served, trained, saved, and ended with one of them."""

import re
import signal
import time
from dataclasses import replace

import grpc
import psutil
import pytest
import torch
from transformers import LlamaForCausalLM

from fedsplit.client.trainer import ClientTrainer
from fedsplit.config import compose
from fedsplit.errors import ConfigError
from fedsplit.serve import plan, reach, trunks_of
from fedsplit.serve.peers import Peers
from fedsplit.trunk.update import TrunkUpdate
from tests.core.worlds import batch
from tests.edge.federation import federate, joined, largest_difference, spec_for
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


def health_until_the_end(address):
    found = set()
    try:
        while True:
            found |= set(health_of(address, ""))
            time.sleep(0.05)
    except grpc.RpcError:
        return found


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


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["model.quantize=nf4", "lora.enabled=true"],
            "launch.trunk_tp=2 cuts plain weights over several ranks, but model.quantize=nf4 packs",
        ),
        (["launch.trunk_servers=2"], "with launch.trunk_tp=2 each rank has a shard"),
    ],
    ids=["quantized", "several servers"],
)
def test_what_needs_a_trunk_in_one_process_is_refused(words, told):
    with pytest.raises(ConfigError, match=told):
        compose(["launch.trunk_tp=2", *words])


def test_ranks_have_no_peers():
    with pytest.raises(ConfigError, match="launch.trunk_tp=2 each rank has a shard"):
        Peers(token="shared").check(compose(["launch.trunk_tp=2"]), TrunkUpdate, is_saved=False)
