"""A trunk over two devices that are none: run by test_placement.py, in a process of its own.

No operation may be given tensors of both, and every number must be, bit by bit, that of the same
trunk on one of them.
"""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.link import LocalLink
from fedsplit.model import connect, initial_parts
from fedsplit.model.lora import add_adapters
from fedsplit.model.placement import placed
from fedsplit.spec import LoraSpec, PolicySpec, RunSpec, SplitSpec, WireSpec
from fedsplit.trunk.service import TrunkService
from fedsplit.trunk.shared_pass import SharedPass
from simulations.tiny import tiny_config
from tests.core.generating import Scene, parts_of, prompt, whole_of
from tests.core.pretend import MixedDevices, Pretending
from tests.core.worlds import batch, same, small_run, update_for

ONE, BOTH = "pretend:0", "pretend:0,pretend:1"
DROPOUT = dict(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)


def moved(trunk, device):
    with Pretending():
        return placed(trunk, device)


def started(service):
    """A service whose engine can compute there."""
    service.engine.run(Pretending().__enter__).result()
    return service


def run_with(*, train=None, **changes):
    run = small_run(**changes)
    train = {"optimizer": "adamw", "lr": 0.01, "clip_norm": 0.01, **(train or {})}
    return replace(run, train=replace(run.train, **train))


class Trunk:
    """A service of a fresh trunk on these devices."""

    def __init__(self, config, run, device, *, replicas=False):
        self.config, self.run, self.device = config, run, device
        self.part = moved(self._parts().trunk, device)
        self.service = TrunkService(self.part, run, update=update_for(run, replicas=replicas))

    def __enter__(self):
        started(self.service.__enter__())
        return self

    def __exit__(self, *_):
        self.service.__exit__()

    def fit(self, *names):
        """Two steps of new clients at once; their weights."""
        self.service.expect(names, round=0, at_once=len(names), close_after=len(names))
        with ThreadPoolExecutor(len(names)) as pool:
            return list(pool.map(self._fit, names, [self._parts().client for _ in names]))

    def _fit(self, name, model):
        link = LocalLink(self.service, self.service.admit(name))
        trunk = RemoteTrunk(link, model, self.run, client=name)
        connect(model, trunk)
        trainer = ClientTrainer(model, trunk, self.run)
        trainer.fit([batch(ord(name) + i), batch(i, pad=3)] for i in range(2))
        trainer.evaluate([batch(50)])
        return dict(model.named_parameters())

    def _parts(self):
        parts = initial_parts(
            self.config, self.run.split, self.run.seed, attn_implementation="eager"
        )
        for part in (parts.client, parts.trunk):
            add_adapters(part, self.run.lora, self.run.seed)
        return parts

    def state(self):
        """All that the trunk's training goes on from."""
        return self.service.engine.state()


def trained(config, run, device, *names, replicas=False):
    """What is left of a round of these clients: the trunk's state, and the clients' weights."""
    with Trunk(config, run, device, replicas=replicas) as trunk:
        clients = trunk.fit(*names)
        if replicas:
            trunk.service.average({name: 1 / len(names) for name in names})
        return [trunk.state(), *clients]


# --- the two devices ------------------------------------------------------------------------------


def test_an_operation_on_both_is_refused():
    with Pretending():
        here, there = (torch.ones(2, device=device) for device in BOTH.split(","))
    with pytest.raises(MixedDevices, match="aten.add.Tensor on pretend:0 and pretend:1"):
        here + there
    assert (here + there.to(here.device)).sum().item() == 4.0


def test_blocks_lie_in_runs_and_all_else_on_the_first(tiny_llama):
    with Trunk(tiny_llama(num_hidden_layers=7), run_with(), BOTH) as trunk:
        layers = trunk.part.model.layers
        places = [{str(p.device) for p in layers[i].parameters()} for i in range(1, 6)]
        assert places == 2 * [{"pretend:0"}] + 3 * [{"pretend:1"}]
        assert {str(each.device) for each in trunk.part.model.rotary_emb.buffers()} == {ONE}


# --- training -------------------------------------------------------------------------------------

RUNS = {
    "all weights": run_with(),
    "adapters": run_with(lora=LoraSpec(enabled=True, rank=2, alpha=4)),
    "checkpointing": run_with(train={"checkpointing": "trunk"}),
    "sgd": run_with(train={"optimizer": "sgd", "momentum": 0.9}),
    "further steps": run_with(train={"trunk_steps": 2, "accumulation": 2}),
    "frozen": run_with(train={"mode": "frozen_trunk"}),
    "compressed": run_with(wire=WireSpec(grad_down="int8", budget_s=10.0)),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_training_is_that_on_one_device(tiny_gpt2, run):
    one, both = (trained(tiny_gpt2(**DROPOUT), run, device, "a") for device in (ONE, BOTH))
    assert all(map(same, one, both))


@pytest.mark.parametrize("family", ["bloom", "gemma3_text", "gpt_neox", "opt"])
def test_so_it_is_in_every_family(family):
    config, run = tiny_config(family, num_hidden_layers=4), run_with()
    one, both = (trained(config, run, device, "a") for device in (ONE, BOTH))
    assert all(map(same, one, both))


def test_several_clients_share_passes(tiny_llama):
    run = run_with(train={"clients_per_pass": 3, "max_queue_delay_s": 20.0})
    one, both = (trained(tiny_llama(), run, device, *"abc") for device in (ONE, BOTH))
    assert all(map(same, one, both))
    with Trunk(tiny_llama(), run, BOTH) as trunk:
        training = trunk.service.engine.training
        with Pretending():
            assert training._batched.possible(training.shared.versions)


def test_older_versions_stay_where_they_were(tiny_llama):
    run = run_with(policy=PolicySpec(kind="async"))
    with Trunk(tiny_llama(), run, BOTH) as trunk:
        trunk.fit(*"abc")
        assert trunk.service.engine.version == 6


def test_replicas_are_averaged(tiny_gpt2):
    found = [
        trained(tiny_gpt2(), run_with(), device, "a", "b", replicas=True) for device in (ONE, BOTH)
    ]
    assert all(map(same, *found))


def test_a_snapshot_of_two_devices_goes_on_on_one_and_on_two(tiny_llama):
    run = run_with()
    with Trunk(tiny_llama(), run, BOTH) as trunk:
        trunk.fit("a")
        kept = trunk.state()
    went_on = []
    for device in ("cpu", ONE, BOTH):
        with Trunk(tiny_llama(), run, device) as trunk:
            trunk.service.engine.load_state(kept)
            assert same(trunk.state(), kept)
            went_on.append([*trunk.fit("b"), trunk.state()])
    assert all(map(same, *went_on[1:]))


# --- generation -----------------------------------------------------------------------------------


@contextmanager
def scene(family, device=BOTH):
    run = RunSpec(split=SplitSpec.parse("1/2/1"))
    trunk = moved(copy.deepcopy(parts_of(family).trunk), device)
    with TrunkService(trunk, run) as service:
        started(service)
        whole = whole_of(family)
        yield Scene(model_type=family, whole=whole, run=run, trunk=trunk, service=service)


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("kv", ["server", "client"])
@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma3_text"])
def test_tokens_are_those_of_the_unsplit_model(family, kv):
    ids_BT = prompt(rows=3, pad=4)
    with scene(family) as here:
        alice = here.client(kv=kv)
        for name, asked in MODES.items():
            if (name, kv) == ("static", "client"):
                continue
            assert torch.equal(alice.says(ids_BT, **asked), here.wanted(ids_BT, **asked)), name


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma3_text"])
def test_sessions_share_passes(family):
    with scene(family) as here, Pretending(), torch.no_grad():
        assert SharedPass(here.trunk)._possible()
