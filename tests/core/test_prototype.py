"""A model for each message: equal to a built one, and independent of the other messages'."""

import pytest
import torch

from fedsplit.flower.prototype import Prototype
from fedsplit.model import ClientPart, connect, split_model
from fedsplit.model.lora import add_adapters
from fedsplit.spec import LoraSpec
from simulations.families import random_model


@pytest.fixture(params=[False, True])
def build(request, tiny_llama):
    """Builds a client with an adapter, or without one."""

    def build() -> ClientPart:
        builds.append(1)
        client = split_model(random_model(tiny_llama()), "1/2/1").client
        add_adapters(client, LoraSpec(enabled=request.param), seed=1)
        return client

    builds: list[int] = []
    build.builds = builds
    return build


def test_each_message_gets_the_values_of_a_built_model(build):
    prototype, wanted = Prototype(), build().state_dict()
    for _ in range(4):
        model = prototype.model_of("run", build)
        assert model.state_dict().keys() == wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
        ids_BT = torch.arange(6).reshape(1, 6)
        connect(model, lambda hidden_BTD, **_: hidden_BTD)
        model(ids_BT, labels=ids_BT).loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert trained and all(p.grad is not None for p in trained)
        torch.optim.SGD(trained, lr=1.0).step()
        model.config.use_cache = not model.config.use_cache
        model.register_forward_hook(lambda *_: pytest.fail("a hook of another message"))
    assert len(build.builds) == 3, "for this test, the first message, and the prototype"


def test_frozen_weights_share_memory_and_can_be_moved(build):
    prototype = Prototype()
    first, second, third = (prototype.model_of("run", build) for _ in range(3))
    for name, parameter in second.named_parameters():
        other = third.get_parameter(name)
        assert (parameter.data_ptr() == other.data_ptr()) == (not parameter.requires_grad), name
    second.double()
    assert first.dtype == third.dtype == torch.float32


def test_another_run_has_another_model(build):
    prototype = Prototype()
    for key in ("a", "a", "b", "b", "a"):
        prototype.model_of(key, build)
    assert len(build.builds) == 5


def test_after_a_run_the_model_is_released(build):
    prototype = Prototype()
    for key in ("a", "a"):
        prototype.model_of(key, build)
    prototype.clear()
    prototype.model_of("a", build)
    assert len(build.builds) == 3
