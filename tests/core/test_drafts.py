"""A client's own drafts: the same tokens in fewer passes, and as many drafts as are worth it."""

import itertools

import pytest
import torch

from fedsplit.client.drafts import Drafts, Memory, Pace
from fedsplit.wire.messages import GenerateRequest
from tests.core.generating import prompt, scene

KV = ("server", "client")


def drafts_of(client, round_trip_s=1.0):
    """Drafts whose every pass takes 1.25 s by their clock."""
    return Drafts(client.model.config, round_trip_s, clock=itertools.count(0, 1.25).__next__)


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma3_text", "bloom"])
@pytest.mark.parametrize("kv", KV)
def test_drafts_change_no_token_and_save_round_trips(family, kv):
    ids_1T = prompt(9).repeat(1, 2)
    with scene(family) as here:
        alice = here.client(kv=kv)
        drafts = drafts_of(alice)
        for _ in range(2):
            alice.wire.sent.clear()
            text_BT = alice.says(ids_1T, max_new_tokens=24, assistant_model=drafts)
            assert torch.equal(text_BT, here.wanted(ids_1T, max_new_tokens=24))
        # The second time, it has seen the text before.
        assert len(alice.sent(GenerateRequest)) < 12


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("family, source", [("gemma2", "lookup"), ("bloom", "own")])
def test_a_second_turn_goes_on_from_the_cache_of_the_first(family, source, kv):
    first_1T, more_1T = prompt(9).repeat(1, 2), prompt(5, seed=1)
    with scene(family) as here:
        alice = here.client(kv=kv)
        lookup = {"prompt_lookup_num_tokens": 3}
        options = lookup if source == "lookup" else {"assistant_model": drafts_of(alice)}
        cache = alice.model.new_cache()
        said_1T = alice.says(first_1T, past_key_values=cache, **options)
        second_1T = torch.cat([said_1T, more_1T], dim=1)
        said_1T = alice.says(second_1T, past_key_values=cache, **options)
        assert torch.equal(said_1T, here.wanted(second_1T))
        assert cache.get_seq_length() == said_1T.shape[1] - 1


def test_a_text_ends_at_the_last_position_of_the_model():
    ids_1T = prompt(9).repeat(1, 2)
    with scene("gpt2") as here:
        alice = here.client()
        new = alice.model.config.n_positions - ids_1T.shape[1]
        text_BT = alice.says(ids_1T, max_new_tokens=new, assistant_model=drafts_of(alice))
        assert torch.equal(text_BT, here.wanted(ids_1T, max_new_tokens=new))


def test_a_pace_asks_for_more_certain_drafts_where_the_trunk_is_near():
    far, near = Pace(0.08), Pace(0.0)
    assert far.worth == near.worth == 1.0, "nothing is measured yet"
    far.add(sent=1, gained=1, seconds=0.08 + 0.05)
    near.add(sent=1, gained=1, seconds=0.05)
    # One more token takes an eighth of a pass.
    assert far.worth == pytest.approx(0.05 / 8 / 0.13)
    assert near.worth == pytest.approx(1 / 8)
    far.add(sent=5, gained=2, seconds=0.08 + 0.05 * 1.5)
    assert far.worth == pytest.approx(0.05 / 8 * (0.9 + 2) / (0.9 * 0.13 + 0.155))


def test_a_far_trunk_gets_more_drafts_at_a_time_than_one_nearby():
    ids_1T = prompt(9).repeat(1, 2)
    with scene("gpt2") as here:
        requests = []
        for round_trip_s in (0.0, 1.25):
            alice = here.client()
            drafts = drafts_of(alice, round_trip_s)
            for _ in range(2):
                alice.says(ids_1T, max_new_tokens=24, assistant_model=drafts)
            # What it has seen once, it guesses rightly.
            requests.append(len(alice.sent(GenerateRequest)))
        assert requests[0] > requests[1]


def test_a_memory_guesses_by_the_longest_context_and_learns_how_often_it_is_right():
    memory = Memory()
    memory.add([1, 2, 3, 9, 2, 4], 0, is_prompt=True)
    assert memory.guess([1, 2]) == (3, 2)
    assert memory.guess([7, 2]) == (4, 1)
    assert memory.guess([7]) == (0, 0)
    before = memory.chance(1)
    memory.add([7, 2, 5], 1, is_prompt=False)
    # 2 was followed by 4 and now is by 5; nothing was known of 7.
    assert memory.chance(1) < before
    assert memory.guess([2]) == (5, 1)
