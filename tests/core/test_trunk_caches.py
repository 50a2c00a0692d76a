"""The trunk's caches: what is done to them, what they may cost, and how lost ones come back."""

import gc
import random
from dataclasses import replace

import pytest
import torch

from fedsplit.errors import (
    BadTensor,
    ConnectionLost,
    FedsplitError,
    Forbidden,
    NonFinite,
    ProtocolError,
    SessionLost,
    TooLarge,
)
from fedsplit.link import LocalLink
from fedsplit.model.kv_cache import capacity
from fedsplit.wire import messages as m
from tests.core.generating import prompt, scene
from tests.core.worlds import Clock, batch, small_run, world

MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


_NO_STATIC = ("bloom", "static")  # nor has the unsplit one


# --- what is done to them ---------------------------------------------------------------------


def on_both(here, alice, change):
    """The whole model's logits after a change of the cache between two texts, and Alice's."""
    first_BT, then_BT = prompt(6, rows=2), prompt(4, rows=4, seed=1)
    found = []
    for model in (here.whole, alice.model):
        cache = model.new_cache() if model is alice.model else None
        with torch.no_grad():
            cache = model(first_BT, past_key_values=cache, use_cache=True).past_key_values
            rows = change(cache)
            found.append(model(then_BT[:rows], past_key_values=cache).logits)
    return found


CHANGES = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])) or 2,
    "take one twice": lambda cache: cache.reorder_cache(torch.tensor([1, 1])) or 2,
    "crop": lambda cache: cache.crop(-2) or 2,
    "crop all": lambda cache: cache.crop(-6) or 2,
    "repeat": lambda cache: cache.batch_repeat_interleave(2) or 4,
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])) or 1,
    "repeat, crop and reorder": lambda cache: (
        cache.batch_repeat_interleave(2)
        or cache.crop(-1)
        or cache.reorder_cache(torch.tensor([3, 0, 1, 1]))
        or 4
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_done_to_a_cache_reaches_the_trunk(change):
    with scene("llama") as here:
        for kv in ("server", "client"):
            wanted, got = on_both(here, here.client(kv, kv=kv), change)
            assert torch.allclose(got, wanted, atol=1e-5)
        assert here.service.num_sessions == 2


def test_a_reset_begins_over():
    with scene("llama") as here, torch.no_grad():
        alice = here.client()
        cache = alice.remote.new_cache()
        first = cache.carry(torch.ones(1, 5, 32), None, None)
        cache.reset()
        assert torch.equal(cache.carry(torch.ones(1, 5, 32), None, None), first)
        assert [request.past for request in alice.sent(m.GenerateRequest)] == [0, 0]
        assert here.service.engine.cache_bytes == bytes_of(here, first.shape[1])


def bytes_of(here, tokens):
    """Keys and values of two blocks, in float32, with the room that a growing cache takes."""
    config = here.whole.config
    return capacity(tokens) * 2 * 2 * 4 * config.num_key_value_heads * config.head_dim


def test_one_vector_goes_up_and_one_comes_down_per_token():
    with scene("llama") as here:
        alice = here.client()
        alice.says(prompt(12))
        tokens = [request.smashed_BTD.shape[1] for request in alice.sent(m.GenerateRequest)]
        assert tokens == [12] + 7 * [1]


# --- what they may cost -----------------------------------------------------------------------


def test_a_session_past_its_tokens_is_refused_with_the_numbers():
    with scene("gpt2", session_tokens=40) as here:
        alice = here.client()
        with pytest.raises(TooLarge, match=r"3 sequences of 0 \+ 14 tokens are 42; .* at most 40"):
            alice.says(prompt(14, rows=3))
        with pytest.raises(TooLarge, match=r"2 sequences of 20 \+ 1 tokens are 42; .* at most 40"):
            alice.says(prompt(18, rows=2))
        with pytest.raises(TooLarge, match=r"a cache of 57 tokens was asked for; .* at most 40"):
            alice.says(prompt(50), cache_implementation="static")
        with pytest.raises(
            TooLarge, match="3 sequences of 17 tokens were asked for; .* at most 40"
        ):
            alice.says(prompt(10, rows=3), cache_implementation="static")
        assert torch.equal(alice.says(prompt(20)), here.wanted(prompt(20)))


def test_a_cache_past_all_bytes_is_refused_before_any_is_taken():
    with scene("llama") as here:
        most, needed = bytes_of(here, 64), bytes_of(here, 65)
    with scene("llama", cache_bytes=most) as here:
        alice = here.client()
        with pytest.raises(TooLarge, match=f"would take {needed} bytes; .* take {most}"):
            alice.says(prompt(65))
        assert here.service.engine.cache_bytes == 0
        with pytest.raises(TooLarge, match=f"would take {needed} bytes"):
            alice.says(prompt(60))
        assert alice.says(prompt(56)).shape == (1, 64)


@pytest.mark.parametrize("cache_tokens", [None, 20], ids=["growing", "static"])
def test_who_was_used_least_recently_makes_room_and_comes_back(cache_tokens):
    """Three take turns in a room for two, so that each finds itself evicted."""
    with scene("llama") as here:
        room = 2 * bytes_of(here, 20) * (cache_tokens or capacity(20)) // capacity(20)
    with scene("llama", cache_bytes=room) as here:
        clients = [here.client(name) for name in ("alice", "bob", "carol")]
        caches = [client.model.new_cache(cache_tokens) for client in clients]
        texts = [prompt(12, seed=seed) for seed in range(3)]
        for new in (3, 5):
            asked = {"min_new_tokens": new, "max_new_tokens": new}
            for i, client in enumerate(clients):
                wanted = here.wanted(texts[i], **asked)
                assert torch.equal(
                    client.says(texts[i], past_key_values=caches[i], **asked), wanted
                )
                texts[i] = wanted
                assert here.service.engine.cache_bytes <= room
        assert max(len(client.sent(m.OpenRequest)) for client in clients) >= 2


@pytest.mark.parametrize("family", ["gemma2", "qwen3_next"])
def test_budgets_hold_where_blocks_keep_a_window_or_a_state(family):
    with scene(family) as here:
        here.client().says(prompt(12))
        most = here.service.engine.cache_bytes
    with scene(family, cache_bytes=2 * most) as here:
        for name in ("alice", "bob", "carol"):
            assert torch.equal(here.client(name).says(prompt(12)), here.wanted(prompt(12)))
            assert 0 < here.service.engine.cache_bytes <= 2 * most


def test_who_is_idle_too_long_is_dropped_and_comes_back():
    clock = Clock()
    with scene("llama", clock, ttl_s=60.0, max_queue_delay_s=0.0) as here:
        alice, bob = here.client("alice"), here.client("bob")
        cache = alice.model.new_cache()
        first_1T = alice.says(prompt(), past_key_values=cache)
        clock.now = 61.0
        bob.says(prompt(5))
        assert here.service.engine.cache_bytes == bytes_of(here, 12)  # Bob's
        second_1T = torch.cat([first_1T, prompt(3, seed=2)], dim=1)
        assert torch.equal(alice.says(second_1T, past_key_values=cache), here.wanted(second_1T))
        assert len(alice.sent(m.OpenRequest)) == 2


@pytest.mark.parametrize("end", ["the next cache", "close", "end_generations"])
def test_a_session_ends_with_its_cache(end):
    with scene("llama") as here:
        alice = here.client()
        cache = alice.model.new_cache()
        alice.says(prompt(), past_key_values=cache)
        assert here.service.num_sessions == 1
        del cache
        gc.collect()
        if end == "the next cache":
            alice.says(prompt())
        elif end == "close":
            alice.remote.close()
        else:
            alice.remote.end_generations()
        assert here.service.num_sessions == (1 if end == "the next cache" else 0)


def test_sessions_that_were_lost_leave_no_name_behind():
    with scene("llama") as here:
        alice = here.client()
        cache, text_1T = alice.model.new_cache(), prompt()
        for _ in range(5):
            text_1T = alice.says(text_1T, past_key_values=cache)
            lost = alice.sent(m.GenerateRequest)[-1].session
            alice.wire._link.exchange(m.CloseRequest(session=lost))
        alice.says(text_1T, past_key_values=cache)
        assert len(alice.sent(m.OpenRequest)) == 6
        alice.remote.disconnect()
        assert [each.session for each in alice.sent(m.CloseRequest)] == [
            alice.sent(m.GenerateRequest)[-1].session
        ]


def test_a_client_that_disconnects_ends_its_sessions_beside_one_that_was_lost():
    with scene("llama") as here:
        alice = here.client()
        caches = [alice.model.new_cache() for _ in range(6)]
        for cache in caches:
            alice.says(prompt(), past_key_values=cache)
        lost = alice.sent(m.GenerateRequest)[0].session
        alice.wire._link.exchange(m.CloseRequest(session=lost))
        assert here.service.num_sessions == 5
        alice.remote.disconnect()
        assert here.service.num_sessions == 0


# --- faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_lost_reply_is_answered_again_without_growing_the_cache(mode):
    asked = MODES[mode]
    chance = random.Random(0)
    with scene("gemma2") as here:
        alice = here.client()

        def lose(request):
            if isinstance(request, m.GenerateRequest) and chance.random() < 0.4:
                raise ConnectionLost("the reply went astray", retry_after_s=1e-3)

        alice.wire.after = lose
        ids_1T = prompt(6).repeat(1, 2)
        passes = []
        here.trunk.register_forward_hook(lambda *_: passes.append(1))
        got = alice.says(ids_1T, **asked)
        names = [(request.session, request.call) for request in alice.sent(m.GenerateRequest)]
        assert len(set(names)) < len(names)
        # And one that measures a token, and one that tries a cache of a fixed size.
        assert len(passes) <= len(set(names)) + 2
        assert torch.equal(got, here.wanted(ids_1T, **asked))
        assert len(alice.sent(m.OpenRequest)) == 1


@pytest.mark.parametrize(
    ("family", "mode"),
    [(f, mode) for f in ("llama", "gemma2", "bloom") for mode in MODES if (f, mode) != _NO_STATIC],
)
def test_a_session_lost_at_any_token_is_rebuilt(family, mode):
    """With left padding, and in the middle of beams; at every third request it is gone."""
    asked = MODES[mode]
    with scene(family) as here:
        alice = here.client()

        def lose(request):
            if isinstance(request, m.GenerateRequest) and len(alice.wire.sent) % 3 == 2:
                alice.wire._link.exchange(m.CloseRequest(session=request.session))

        alice.wire.before = lose
        ids_BT = prompt(6, rows=1 if mode == "lookup" else 3, pad=2).repeat(1, 2)
        ids_BT = ids_BT[:, :6] if mode != "lookup" else prompt(6).repeat(1, 2)
        assert torch.equal(alice.says(ids_BT, **asked), here.wanted(ids_BT, **asked))
        assert len(alice.sent(m.OpenRequest)) >= 3


def test_a_session_that_is_lost_again_and_again_is_an_error_in_the_end():
    with scene("llama") as here:
        alice = here.client()

        def lose(request):
            if isinstance(request, m.GenerateRequest):
                raise SessionLost("gone")

        alice.wire.before = lose
        with pytest.raises(SessionLost, match="gone"):
            alice.says(prompt())


def test_a_cache_goes_on_after_an_error_as_if_there_had_been_none():
    """What came of the failed request nobody knows, so everything is sent again."""
    with scene("llama", budget_s=1e-6) as here, torch.no_grad():
        alice = here.client()
        cache, twin = alice.remote.new_cache(), alice.remote.new_cache()
        for each in (cache, twin):
            each.carry(torch.ones(2, 4, 32), None, None)
            each.reorder_cache(torch.tensor([1, 1]))

        def lose(request):
            raise ConnectionLost("the reply went astray")

        alice.wire.after = lose
        next_BTD = torch.full((2, 1, 32), 0.5)
        with pytest.raises(ConnectionLost):
            cache.carry(next_BTD, None, None)
        alice.wire.after = lambda request: None
        got, wanted = (each.carry(next_BTD, None, None) for each in (cache, twin))
        assert torch.allclose(got, wanted, atol=1e-6)
        assert alice.sent(m.GenerateRequest)[-2].past == 0


# --- strangers --------------------------------------------------------------------------------


def opened(here, name="mallory", cache_tokens=0):
    """A link, and an open session of a client that may send what it likes."""
    session = here.client(name).remote.open_cache(cache_tokens)
    return LocalLink(here.service, here.service.admit(name)), session


def request_of(session, **changes):
    """Three tokens of two sequences."""
    plain = m.GenerateRequest(
        session=session, call=0, past=0, logits_to_keep=1, smashed_BTD=torch.ones(2, 3, 32)
    )
    return replace(plain, **changes)


def entries(blocks=(1, 2), heads=2, tokens=3, width=8, value=0.0, rows=2):
    keys_BHTE = torch.full((rows, heads, tokens, width), value)
    return tuple(
        m.KVCacheEntry(block=b, keys_BHTE=keys_BHTE, values_BHTE=keys_BHTE) for b in blocks
    )


BROUGHT = dict(stateless=True, past=3)
NONSENSE = {
    "beyond what it holds": (
        dict(past=9),
        SessionLost,
        "holds 3 tokens, but this request continues 9",
    ),
    "rows that are not there": (
        dict(past=3, rows_B=torch.tensor([0, 2])),
        ProtocolError,
        r"rows \[0, 2\] were asked for, but the cache holds 2 sequences",
    ),
    "rows below zero": (
        dict(past=3, rows_B=torch.tensor([-1, 0])),
        ProtocolError,
        r"rows \[-1, 0\] were asked for, but the cache holds 2 sequences",
    ),
    "too few rows": (dict(past=3, rows_B=torch.tensor([0])), BadTensor, "for each of 2 sequences"),
    "other rows than it holds": (
        dict(past=3, smashed_BTD=torch.ones(3, 1, 32)),
        SessionLost,
        "holds 2 sequences, but this request has 3",
    ),
    "another precision than before": (
        dict(past=3, smashed_BTD=torch.ones(2, 1, 32), autocast="float16"),
        SessionLost,
        "was computed with autocast=off, but this request asks for float16",
    ),
    "a wrong width": (dict(smashed_BTD=torch.ones(2, 3, 16)), BadTensor, "hidden size is 32"),
    "another dtype": (
        dict(smashed_BTD=torch.ones(2, 3, 32).double()),
        BadTensor,
        "computes in torch.float32",
    ),
    "NaN": (dict(smashed_BTD=torch.full((2, 3, 32), torch.nan)), NonFinite, "smashed_BTD holds"),
    "more wanted than sent": (
        dict(logits_to_keep=4),
        ProtocolError,
        "logits_to_keep=4 must be at most 3",
    ),
    "a mask that does not fit": (
        dict(attention_mask_BT=torch.ones(2, 4).long()),
        BadTensor,
        r"attention_mask of shape \(2, 4\) does not fit",
    ),
    "a past below zero": (dict(past=-1), ProtocolError, "past=-1 must be at least 0"),
    "too many tokens": (dict(past=1 << 40), TooLarge, "generation.session_tokens"),
    "a call of before": (dict(call=-1), ProtocolError, "call=-1 must be"),
    "no entries": (BROUGHT, ProtocolError, r"came with blocks \[\], but the trunk's are \[1, 2\]"),
    "entries of the client's blocks": (
        {**BROUGHT, "entries": entries((0, 1))},
        ProtocolError,
        r"came with blocks \[0, 1\], but the trunk's are \[1, 2\]",
    ),
    "a block twice": (
        {**BROUGHT, "entries": entries((1, 1, 2))},
        ProtocolError,
        r"blocks \[1, 1, 2\]",
    ),
    "entries of nothing": (
        dict(stateless=True, entries=entries((7,))),
        BadTensor,
        "at most 0 tokens",
    ),
    "wrong heads": ({**BROUGHT, "entries": entries(heads=3)}, BadTensor, "2 heads of width 8"),
    "too few keys": ({**BROUGHT, "entries": entries(tokens=2)}, BadTensor, "at least 3 tokens"),
    "keys of NaN": ({**BROUGHT, "entries": entries(value=torch.nan)}, NonFinite, "keys_BHTE of"),
}


@pytest.fixture(scope="module")
def healthy():
    """A scene that all the nonsense of this file is sent to."""
    with scene("llama") as here:
        yield here


@pytest.mark.parametrize("case", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_a_typed_error_and_others_are_served_on(healthy, case):
    changes, error, text = case
    link, session = opened(healthy)
    link.exchange(request_of(session))
    with pytest.raises(error, match=text):
        link.exchange(request_of(session, **{"call": 1, **changes}))
    if error is not SessionLost:  # nothing was changed
        link.exchange(request_of(session, call=2, past=3, smashed_BTD=torch.ones(2, 1, 32)))
    few = {"max_new_tokens": 2, "min_new_tokens": 2}
    alice = healthy.client("alice")
    assert torch.equal(alice.says(prompt(), **few), healthy.wanted(prompt(), **few))


def test_more_than_a_static_cache_has_room_for_is_refused():
    with scene("llama") as here:
        link, session = opened(here, cache_tokens=4)
        link.exchange(request_of(session))
        with pytest.raises(ProtocolError, match="room for 6 tokens, .* with room for 4"):
            link.exchange(request_of(session, call=1, past=3))


def test_a_session_belongs_to_a_client():
    with scene("llama") as here:
        _, session = opened(here, "alice")
        mallory = LocalLink(here.service, here.service.admit("mallory"))
        with pytest.raises(Forbidden, match="belongs to another client"):
            mallory.exchange(request_of(session))
        with pytest.raises(Forbidden, match="belongs to another client"):
            mallory.exchange(m.CloseRequest(session=session))


def test_a_call_of_before_with_other_content_gets_the_reply_of_before():
    with scene("llama") as here:
        link, session = opened(here)
        first = link.exchange(request_of(session)).trunk_out_BTD
        again = link.exchange(request_of(session, smashed_BTD=torch.zeros(2, 3, 32)))
        assert torch.equal(again.trunk_out_BTD, first)


def test_sessions_are_for_what_they_were_opened_for(tiny_llama):
    with world(tiny_llama(), small_run()) as here:
        alice = here.add("alice")
        alice.trunk.open()
        link = LocalLink(here.service, here.service.admit("alice"))
        with pytest.raises(ProtocolError, match="was not opened to generate"):
            link.exchange(
                request_of(alice.trunk._named_session(), smashed_BTD=torch.ones(1, 2, 16))
            )
        session = alice.trunk.open_cache(0)
        forward = m.ForwardRequest(
            session=session, call=0, training=True, smashed_BTD=torch.ones(1, 2, 16)
        )
        with pytest.raises(FedsplitError, match="not opened for training"):
            link.exchange(forward)
        alice.trunk.close()
        assert alice.trainer.fit([[batch(0)]]).steps == 1
