"""Idle caches: a request goes on from one of the same client, and says what it said without it."""

import gc

import pytest
import torch

from fedsplit.openai.idle_caches import MOST_CACHES, IdleCaches
from fedsplit.serve.reuse import CacheReuse
from fedsplit.wire import messages as m
from tests.core.generating import prompt, scene, whole_of

PLENTY = 1 << 20


def answered(here, alice, idle, ids_1T, rows=1):
    """The text of a request and how many tokens it was spared; the text is the unsplit model's."""
    cache, cached = idle.take(ids_1T[0])
    ids_BT = ids_1T.expand(rows, -1)
    if cached and rows > 1:
        cache.reorder_cache(torch.zeros(rows, dtype=torch.int64))
    text_BT = alice.says(ids_BT, past_key_values=cache)
    idle.give(cache, text_BT, prompt=ids_1T.shape[1])
    assert torch.equal(text_BT, here.wanted(ids_BT))
    return text_BT[:1], cached


def followed(*texts_1T):
    return torch.cat(texts_1T, dim=1)


# Families of which the window is 8 tokens, or of which blocks keep other states than keys.
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_next", "phi3 longrope"])
def test_conversations_go_on_from_their_own_caches(family):
    system_1T = prompt(20)
    with scene(family) as here:
        alice = here.client()
        idle = IdleCaches(alice.model, PLENTY)
        goes_back = family == "llama"
        # Two conversations in turns, with the same system prompt.
        texts = [followed(system_1T, prompt(4, seed=1)), followed(system_1T, prompt(5, seed=2))]
        for turn in range(3):
            for of in (0, 1):
                before = texts[of]
                said_1T, cached = answered(here, alice, idle, before)
                if family == "phi3 longrope":  # other rotary tables from 16 tokens on
                    assert cached == 0
                elif turn:
                    # The last token of an answer is not in the cache, and three are new.
                    assert cached == before.shape[1] - 4
                elif of:
                    assert cached == (20 if goes_back else 0)
                texts[of] = followed(said_1T, prompt(3, seed=turn))
        # An earlier turn is written in another way.
        other_1T = texts[0].clone()
        other_1T[0, 30] = 3 if other_1T[0, 30] != 3 else 4
        assert answered(here, alice, idle, other_1T)[1] == (30 if goes_back else 0)
        # And a request comes again.
        spared = answered(here, alice, idle, other_1T)[1]
        assert spared == (other_1T.shape[1] - 1 if goes_back else 0)


def test_new_tokens_alone_are_sent_and_a_copy_is_made_at_the_trunk():
    first_1T, other_1T = prompt(24), followed(prompt(24)[:, :18], prompt(4, seed=1))
    with scene("llama") as here:
        alice = here.client()
        idle = IdleCaches(alice.model, PLENTY)
        said_1T, _ = answered(here, alice, idle, first_1T)
        answered(here, alice, idle, other_1T)
        answered(here, alice, idle, followed(said_1T, prompt(3, seed=2)))
        prompts = [each for each in alice.sent(m.GenerateRequest) if each.smashed_BTD.shape[1] > 1]
        assert [(each.past, each.smashed_BTD.shape[1]) for each in prompts] == [
            (0, 24),
            (18, 4),
            (31, 4),
        ]
        assert [bool(each.source) for each in prompts] == [False, True, False]
        assert len(alice.sent(m.OpenRequest)) == 2


def test_a_few_common_tokens_are_not_copied_and_several_choices_share_a_prompt():
    with scene("llama") as here:
        alice = here.client()
        idle = IdleCaches(alice.model, PLENTY)
        answered(here, alice, idle, prompt(20))
        short_1T = followed(prompt(20)[:, :15], prompt(9, seed=1))
        assert answered(here, alice, idle, short_1T)[1] == 0
        said_1T, cached = answered(here, alice, idle, short_1T, rows=3)
        assert cached == 23
        assert answered(here, alice, idle, followed(said_1T, prompt(2)))[1] == 31


def test_the_least_recently_used_caches_are_dropped_and_their_sessions_closed():
    with scene("llama") as here:
        alice = here.client()
        one = IdleCaches(alice.model, PLENTY)
        answered(here, alice, one, prompt(20))
        num_bytes = one._idle[0].num_bytes
        assert num_bytes == 27 * (2 * 2 * 2 * 8 + 32) * 4
        few = IdleCaches(alice.model, 3 * num_bytes)
        for seed in (1, 2, 3, 1, 4):
            answered(here, alice, few, prompt(20, seed=seed))
        assert [answered(here, alice, few, prompt(20, seed=seed))[1] for seed in (1, 2)] == [19, 0]
        alice.remote.end_generations()
        assert here.service.num_sessions == 1 + 3
        none = IdleCaches(alice.model, 0)
        assert [answered(here, alice, none, prompt(20))[1] for _ in range(2)] == [0, 0]
        many = IdleCaches(alice.model, PLENTY)
        for seed in range(MOST_CACHES + 2):
            answered(here, alice, many, prompt(3, seed=seed))
        del one, few, none
        gc.collect()
        alice.remote.end_generations()
        assert here.service.num_sessions == MOST_CACHES


def test_caches_that_the_trunk_has_lost_change_no_text():
    with scene("llama", cache_bytes=1) as here:
        pass
    with scene("llama") as here:
        alice = here.client()
        idle = IdleCaches(alice.model, PLENTY)
        texts = [prompt(20), followed(prompt(20)[:, :18], prompt(4, seed=1))]
        for _ in range(2):
            for of, text_1T in enumerate(texts):
                said_1T, _ = answered(here, alice, idle, text_1T)
                texts[of] = followed(said_1T, prompt(2, seed=of))
                for each in {each.session for each in alice.sent(m.GenerateRequest)}:
                    if here.service.has(each):
                        alice.wire._link.exchange(m.CloseRequest(session=each))


def test_two_clients_with_one_prompt_share_nothing():
    with scene("llama") as here:
        alice, bob = here.client("alice"), here.client("bob")
        for client in (alice, bob):
            idle = IdleCaches(client.model, PLENTY)
            assert [answered(here, client, idle, prompt(20))[1] for _ in range(2)] == [0, 19]
        names = [{each.session for each in c.sent(m.GenerateRequest)} for c in (alice, bob)]
        assert not names[0] & names[1]
        assert not any(each.source for c in (alice, bob) for each in c.sent(m.GenerateRequest))


COMMON = {
    "llama": 10,
    "gemma2": 0,
    "qwen3_next": 0,
    "phi3 longrope": 0,
    "bloom": 10,
}


@pytest.mark.parametrize("family, common", COMMON.items(), ids=COMMON)
def test_what_cannot_go_back_begins_anew(family, common):
    reuse, held_T = CacheReuse(whole_of(family).config), torch.arange(20)
    other_T = torch.cat([torch.arange(10), torch.tensor([50, 51])])
    assert reuse.common(held_T, other_T) == common
    longer = 0 if family == "phi3 longrope" else 20
    assert reuse.common(held_T, torch.arange(24)) == longer
    assert reuse.common(held_T[:6], torch.tensor([0, 1, 50])) == (
        0 if family == "qwen3_next" else 2
    )
    assert reuse.common(held_T, held_T[:1]) == 0
