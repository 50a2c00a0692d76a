"""`--device` of a server may name several devices."""

import pytest
import torch
from transformers import LlamaForCausalLM

from fedsplit.errors import ConfigError, FedsplitError
from fedsplit.serve import Served, hosted, reach
from fedsplit.spec import RunSpec, SplitSpec, WireSpec
from tests.core.worlds import same
from tests.edge.federation import federate, joined, spec_for, without_seconds

RUN = RunSpec(split=SplitSpec.parse("1/*/1"))


@pytest.fixture
def model(tiny_llama, tmp_path):
    torch.manual_seed(0)
    made = LlamaForCausalLM(tiny_llama()).eval()
    made.save_pretrained(tmp_path)
    return made


def serving(folder, device):
    served = [Served(name="tale", model=str(folder))]
    return hosted(served, RUN, WireSpec(bind="127.0.0.1:0"), device=device)


@pytest.mark.parametrize("device", ["cpu,cpu", "auto"])
def test_a_server_spreads_its_trunk_and_serves_it(model, tmp_path, device):
    ids_BT = torch.arange(3, 11).reshape(1, 8)
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with serving(tmp_path, device) as address, reach(str(tmp_path), address) as reached:
        tokens_BT = reached.model.generate(ids_BT, **asked)
    assert torch.equal(tokens_BT, model.generate(ids_BT, **asked))


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("cpu,cuda:0", "device=cpu,cuda:0 names devices of several kinds"),
        ("cpu,cpu,cpu", "device=cpu,cpu,cpu names 3 devices, but the trunk has 2 blocks"),
    ],
)
def test_what_cannot_be_is_told_before_it_listens(model, tmp_path, device, told):
    with pytest.raises(ConfigError, match=told), serving(tmp_path, device):
        pass


def test_a_run_may_have_its_trunk_on_several_devices(tmp_path):
    here, there = (
        federate(spec_for(tmp_path / name, f"launch.trunk_device={device}"))
        for name, device in (("here", "cpu"), ("there", "'cpu,cpu'"))
    )
    assert without_seconds(here.rounds()) == without_seconds(there.rounds())
    assert same(joined(here), joined(there))


@pytest.mark.parametrize("whose", ["trunk", "client"])
def test_a_run_on_a_device_that_is_not_there_says_so(tmp_path, whose):
    with pytest.raises(FedsplitError, match="device=cuda:99 cannot be used"):
        federate(spec_for(tmp_path, f"launch.{whose}_device=cuda:99"))


def test_a_client_is_on_one_device(model, tmp_path):
    with serving(tmp_path, "cpu") as address:
        with pytest.raises(ConfigError, match="device=cpu,cpu cannot be used"):
            reach(str(tmp_path), address, device="cpu,cpu")
