"""Dropout is that of the work, whatever else the process does meanwhile."""

import threading

import torch
from transformers import GPT2Config, LlamaConfig

from fedsplit.model import initial_parts
from fedsplit.randomness import draws, rng_released, rng_scope
from fedsplit.spec import SplitSpec
from tests.core.worlds import batch, same, small_run, world


def test_a_block_depends_on_its_name_alone():
    with rng_scope("a"):
        first = torch.rand(3)
    torch.rand(5)
    with rng_scope("a"):
        again = torch.rand(3)
    with rng_scope("b"):
        other = torch.rand(3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_callers_generator_is_left_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with rng_scope("a"):
        torch.rand(7)
    assert torch.equal(torch.rand(3), expected)


def test_others_draw_in_a_pause_and_nothing_is_lost():
    with rng_scope("a"):
        straight = torch.rand(2), torch.rand(2)
    with rng_scope("a"):
        before = torch.rand(2)
        with rng_released():
            with rng_scope("b"):
                torch.rand(9)
        after = torch.rand(2)
    assert torch.equal(torch.cat(straight), torch.cat((before, after)))


def test_a_model_with_dropout_is_known(tiny_gpt2, tiny_llama):
    split = SplitSpec.parse("1/*/1")
    for config, expected in (
        (tiny_gpt2(), False),
        (tiny_gpt2(resid_pdrop=0.1), True),
        (tiny_llama(), False),
        (tiny_llama(attention_dropout=0.1), True),
    ):
        assert isinstance(config, GPT2Config | LlamaConfig)
        parts = initial_parts(config, split, 0)
        assert draws(parts.client) == draws(parts.trunk) == expected


def trained(config):
    """Three clients in threads of one process, two steps each; all weights at the end."""
    with world(config, small_run()) as here:
        members = [here.add(f"c{i}") for i in range(3)]
        here.service.expect(list(here.members), round=1, at_once=3, close_after=3)
        threads = [
            threading.Thread(target=m.trainer.fit, args=([[batch(i)], [batch(i + 10)]],))
            for i, m in enumerate(members)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30.0)
    weights = here.trunk_weights()
    for i, member in enumerate(members):
        weights |= {f"{i}/{k}": p.detach() for k, p in member.model.named_parameters()}
    return weights, here.service.engine.version


def test_clients_that_share_a_process_get_the_same_numbers_every_time(tiny_gpt2):
    config = tiny_gpt2(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    (weights, version), (again, _) = trained(config), trained(config)
    assert version == 2
    assert same(weights, again)
