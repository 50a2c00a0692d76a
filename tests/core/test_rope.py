"""Rotary tables that depend on the length of a pass: each sequence gets those of a pass alone."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache

from fedsplit.model import model_class_for
from fedsplit.model.build import initial_whole
from fedsplit.trunk.shared_pass import SharedPass
from fedsplit.wire import messages as m
from simulations.tiny import tiny_config
from tests.core.generating import ROPES, generated, prompt, scene
from tests.core.passes import counted, segments
from tests.core.worlds import joint_run, world

BY_LENGTH = [name for name in ROPES if "yarn" not in name and "llama3" not in name]
"""Those whose tables depend on the largest position of a pass."""
LENGTHS = [5, 12, 40]
"""Prompts before, across and beyond the original length, with eight tokens more."""


def of_the_whole(here, ids_BT, **asked):
    """What the unsplit model generates that has seen no other sequence."""
    return generated(copy.deepcopy(here.whole), ids_BT, **asked)


def logits_of(model, pieces, cache):
    """The logits of these tokens, a piece after another."""
    with torch.no_grad():
        return [
            model(piece_BT, past_key_values=cache, use_cache=True).logits for piece_BT in pieces
        ]


@pytest.mark.parametrize("rope", ROPES)
def test_tokens_before_across_and_beyond_the_original_length(rope):
    """Prompts are longer than a piece of the trunk's passes; the last one is shorter again."""
    with scene(rope, chunk_tokens=8) as here:
        alice = here.client()
        for tokens in (*LENGTHS, 20):
            ids_BT = prompt(tokens, rows=2, pad=2)
            assert torch.equal(alice.says(ids_BT), of_the_whole(here, ids_BT))


@pytest.mark.parametrize("rope", ROPES)
def test_tokens_beside_a_longer_sequence(rope):
    with scene(rope, chunk_tokens=8, max_queue_delay_s=0.05) as here:
        prompts = [prompt(tokens, seed=tokens) for tokens in LENGTHS]
        clients = [here.client(f"client-{i}") for i in range(len(prompts))]
        with ThreadPoolExecutor(len(prompts)) as pool:
            got = list(pool.map(lambda client, ids: client.says(ids), clients, prompts))
        for said, ids_BT in zip(got, prompts, strict=True):
            assert torch.equal(said, of_the_whole(here, ids_BT))


@pytest.mark.parametrize("rope", ROPES)
def test_only_sequences_with_the_same_tables_share_a_pass(rope):
    with scene(rope) as here, torch.no_grad():
        shared = SharedPass(here.trunk)
        caches = [[here.trunk.new_cache() for _ in range(3)] for _ in range(2)]
        past = [0, 0, 0]
        with counted(here) as passes:
            for seed, tokens in enumerate(([3, 10, 20], [1, 1, 1], [9, 9, 1])):
                lengths = [(1, each) for each in tokens]
                together = shared(segments(here.trunk, lengths, past, caches[0], seed))
                alone = segments(here.trunk, lengths, past, caches[1], seed)
                for ours, theirs in zip(together, alone, strict=True):
                    assert torch.allclose(ours, shared([theirs])[0], atol=1e-5)
                past = [gone + each for gone, each in zip(past, tokens, strict=True)]
        assert 2 in passes if rope in BY_LENGTH else 3 in passes


@pytest.mark.parametrize("rope", BY_LENGTH)
@pytest.mark.parametrize("kv", ["server", "client"])
def test_a_lost_cache_gets_its_earlier_tables_again(rope, kv):
    """The keys before the original length have other tables than those after it."""
    pieces = prompt(24).split([10, 4, 1, 1, 1, 1, 4, 2], dim=1)
    with scene(rope) as here:
        alice, losses = here.client(kv=kv), [14, 17, 22]

        def lose(request):
            if losses and getattr(request, "past", 0) == losses[0]:
                losses.pop(0)
                alice.wire._link.exchange(m.CloseRequest(session=request.session))

        alice.wire.before = lose
        got = logits_of(alice.model, pieces, alice.model.new_cache())
        assert not losses
        whole = copy.deepcopy(here.whole)
        wanted = logits_of(whole, pieces, DynamicCache(config=whole.config))
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_clients_with_other_positions_share_no_training_pass():
    family, fields = ROPES["phi3 longrope"]
    sizes = {"num_hidden_layers": 4, "initializer_range": 0.3}
    config = tiny_config(family, **sizes, **copy.deepcopy(fields))
    run, ids_BT = joint_run(clients=2, max_queue_delay_s=0.1), prompt(9)
    positions = [torch.arange(first, first + 9)[None] for first in (0, 20)]

    def loss_of(model, positions_BT):
        inputs = {"input_ids": ids_BT, "labels": ids_BT, "position_ids": positions_BT}
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        return loss.detach()

    with world(config, run) as here, ThreadPoolExecutor(2) as pool:
        here.service.expect(("alice", "bob"), round=0, at_once=2, close_after=2)
        members = [here.add(name) for name in ("alice", "bob")]
        for member in members:
            member.trunk.open()
        losses = list(pool.map(loss_of, [each.model for each in members], positions))
    for loss, positions_BT in zip(losses, positions, strict=True):
        whole = initial_whole(config, run.seed, model_class=model_class_for(config))
        torch.testing.assert_close(loss, loss_of(whole, positions_BT))


def test_a_family_that_goes_by_the_largest_position_in_its_own_way_takes_turns():
    def by_position(_, inputs, out_BTD):
        positions_BT = inputs[2]
        return out_BTD * (2 if positions_BT is not None and positions_BT.max() >= 100 else 1)

    with scene("llama") as here, torch.no_grad():
        here.trunk.register_forward_hook(by_position)
        shared, caches = SharedPass(here.trunk), [here.trunk.new_cache() for _ in range(2)]
        shared(segments(here.trunk, [(1, 3), (1, 3)], [0, 0], caches, 0))
        with counted(here) as passes:
            shared(segments(here.trunk, [(1, 1), (1, 1)], [3, 3], caches, 1))
        assert passes == [1, 1]
