"""The hook of a training method: how a step of the trunk is made from the clients' gradients."""

import pytest
import torch

from fedsplit.errors import ConfigError
from fedsplit.trunk.update import TrunkUpdate
from tests.core.requests import contribute, prepare
from tests.core.worlds import small_run, world

LR = 0.1
TOKENS = {"a": 5, "b": 10, "c": 5}


class Median(TrunkUpdate):
    """The coordinate-wise median (Yin et al. 2018, arXiv 1803.01498, definition 1)."""

    def combine(self, contributions, weights):
        names = contributions[0].gradients
        return {
            name: torch.stack([each.gradients[name] for each in contributions]).median(0).values
            for name in names
        }


class MedianTwice(Median):
    """A second step with the same gradients."""

    def after_step(self, step):
        if step.taken == 1:
            step.take(step.contributions)


def stepped(config, update, order="abc"):
    """The change of the trunk in one step of three clients, and the gradients of each."""
    with world(config, small_run(), update=update) as here:
        here.service.expect(tuple("abc"), round=0, at_once=3, close_after=3)
        before = here.trunk_weights()
        found = {name: prepare(here, name, seed=ord(name)) for name in "abc"}
        for name in order:
            contribute(here, name, found[name][0], num_tokens=TOKENS[name])
        after = here.trunk_weights()
        version = here.service.engine.version
    return {k: after[k] - before[k] for k in after}, [found[n][1] for n in "abc"], version


def test_a_step_is_the_weighted_mean_by_default(tiny_llama):
    moved, gradients, version = stepped(tiny_llama(), TrunkUpdate)
    assert version == 1
    for name, change in moved.items():
        a, b, c = (each[name] for each in gradients)
        torch.testing.assert_close(change, -LR * (0.25 * a + 0.5 * b + 0.25 * c))


@pytest.mark.parametrize("order", ["abc", "cab"])
def test_a_method_combines_gradients_in_its_own_way(tiny_llama, order):
    moved, gradients, version = stepped(tiny_llama(), Median, order)
    assert version == 1
    for name, change in moved.items():
        middle = torch.stack([each[name] for each in gradients]).median(0).values
        torch.testing.assert_close(change, -LR * middle)


def test_a_method_takes_further_steps(tiny_llama):
    once, _, _ = stepped(tiny_llama(), Median)
    moved, _, version = stepped(tiny_llama(), MedianTwice)
    assert version == 2
    for name, change in moved.items():
        torch.testing.assert_close(change, 2 * once[name])


def test_further_steps_that_no_method_takes_are_refused(tiny_llama):
    run = small_run()
    run = small_run(train=type(run.train)(trunk_steps=2))
    with (
        pytest.raises(ConfigError, match="TrunkUpdate takes one step at a time; use strategy=mu_"),
        world(tiny_llama(), run, update=TrunkUpdate),
    ):
        pass
