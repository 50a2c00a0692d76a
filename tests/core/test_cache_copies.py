"""Copies of a cache: the trunk copies keys and values, and nobody gets those of another client."""

import copy
import random
from dataclasses import replace

import pytest
import torch

from fedsplit.errors import ConnectionLost, ProtocolError, SessionLost, TooLarge
from fedsplit.link import LocalLink
from fedsplit.model.kv_cache import remote_of
from fedsplit.wire import messages as m
from tests.core.generating import prompt, scene
from tests.core.worlds import Clock


def prefilled(model, ids_BT, cache=None):
    """A cache that holds these tokens."""
    cache = model.new_cache() if cache is None else cache
    with torch.no_grad():
        model(ids_BT, past_key_values=cache, attention_mask=(ids_BT != 0).long())
    return cache


def next_logits(model, ids_BT, cache):
    """The logits of further tokens, without padding."""
    mask_BT = torch.ones(len(ids_BT), cache.get_seq_length() + ids_BT.shape[1]).long()
    mask_BT[0, :PAD] = 0
    with torch.no_grad():
        return model(ids_BT, past_key_values=cache, attention_mask=mask_BT).logits


PAD = 2
FIRST, THEN = prompt(9, rows=2, pad=PAD), prompt(4, rows=2, seed=1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_next", "bloom"])
def test_a_copy_has_the_bits_of_its_source_and_sends_its_new_tokens_alone(family):
    with scene(family) as here:
        alice = here.client()
        source = prefilled(alice.model, FIRST)
        copied, replayed = copy.deepcopy(source), copy.deepcopy(source)
        remote_of(replayed)._must_replay = True
        got = next_logits(alice.model, THEN, copied)
        first = alice.sent(m.GenerateRequest)[-1]
        assert (first.past, first.smashed_BTD.shape[1], first.source_call) == (9, 4, 0)
        assert first.source == alice.sent(m.GenerateRequest)[0].session != first.session
        assert torch.equal(got, next_logits(alice.model, THEN, source))
        torch.testing.assert_close(got, next_logits(alice.model, THEN, replayed), atol=1e-5, rtol=0)
        assert alice.sent(m.GenerateRequest)[-1].past == 0
        # Later requests name no source.
        next_logits(alice.model, THEN, copied)
        assert (alice.sent(m.GenerateRequest)[-1].source, len(alice.sent(m.OpenRequest))) == ("", 3)


CHANGES = {
    "crop": lambda cache: cache.crop(-3) or 2,
    "repeat": lambda cache: cache.batch_repeat_interleave(2) or 4,
    "crop and reorder": lambda cache: (
        cache.crop(-1) or cache.reorder_cache(torch.tensor([1, 0, 1])) or 3
    ),
}


@pytest.mark.parametrize("kv", ["server", "client"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_copies_are_cropped_and_reordered_apart_from_their_source(change, kv):
    ids_BT, then_BT = prompt(9, rows=2, seed=3), prompt(4, rows=4, seed=1)
    with scene("llama") as here, torch.no_grad():
        alice = here.client(kv=kv)
        wanted = []
        for model in (here.whole, alice.model):
            cache = model.new_cache() if model is alice.model else None
            cache = model(ids_BT, past_key_values=cache, use_cache=True).past_key_values
            copied = copy.deepcopy(cache)
            rows = change(copied)
            of_copy = copy.deepcopy(copied)
            found = [
                model(then_BT[:rows], past_key_values=copied).logits,
                model(then_BT[:rows], past_key_values=of_copy).logits,
                model(then_BT[:2], past_key_values=cache).logits,
            ]
            wanted.append(found)
        for ours, theirs in zip(*wanted, strict=True):
            torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
        assert [bool(each.past) for each in alice.sent(m.GenerateRequest)] == [False, *[True] * 3]


LOSSES = {
    "closed": lambda alice, source, link: link.exchange(m.CloseRequest(session=session_of(alice))),
    "cropped and continued": lambda alice, source, link: (
        source.crop(-5) or next_logits(alice.model, prompt(7, rows=2, seed=9), source)
    ),
    "reordered": lambda alice, source, link: (
        source.reorder_cache(torch.tensor([1, 0])) or next_logits(alice.model, THEN, source)
    ),
    "begun anew": lambda alice, source, link: (
        source.reset() or prefilled(alice.model, prompt(12, rows=2, seed=8), source)
    ),
}


def session_of(alice):
    return alice.sent(m.GenerateRequest)[0].session


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
def test_a_copy_whose_source_is_lost_or_changed_is_sent_again(lose):
    with scene("llama") as here:
        alice = here.client()
        source = prefilled(alice.model, FIRST)
        wanted = next_logits(alice.model, THEN, prefilled(alice.model, FIRST))
        copied = copy.deepcopy(source)
        lose(alice, source, alice.wire._link)
        got = next_logits(alice.model, THEN, copied)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
        assert [each.past for each in alice.sent(m.GenerateRequest)[-2:]] == [9, 0]


def test_a_copy_goes_on_from_a_source_that_has_only_grown():
    with scene("llama") as here:
        alice = here.client()
        source = prefilled(alice.model, FIRST)
        copied = copy.deepcopy(source)
        wanted = next_logits(alice.model, THEN, source)
        assert torch.equal(next_logits(alice.model, THEN, copied), wanted)
        assert alice.sent(m.GenerateRequest)[-1].past == 9


@pytest.mark.parametrize("cache_tokens", [None, 24], ids=["growing", "static"])
def test_copies_count_in_the_budget_and_may_evict_their_source(cache_tokens):
    with scene("llama") as here:
        prefilled(alice := here.client().model, FIRST, alice.new_cache(cache_tokens))
        one = here.service.engine.cache_bytes
    with scene("llama", cache_bytes=2 * one) as here:
        alice = here.client()
        source = prefilled(alice.model, FIRST, alice.model.new_cache(cache_tokens))
        wanted = next_logits(alice.model, THEN, copy.deepcopy(source))
        copies = [copy.deepcopy(source) for _ in range(3)]
        for each in copies:
            assert torch.equal(next_logits(alice.model, THEN, each), wanted)
            assert one < here.service.engine.cache_bytes <= 2 * one
    with scene("llama", session_tokens=25) as here:
        alice = here.client()
        copied = copy.deepcopy(prefilled(alice.model, FIRST))
        with pytest.raises(TooLarge, match=r"2 sequences of 9 \+ 4 tokens are 26; .* at most 25"):
            next_logits(alice.model, THEN, copied)


def test_the_first_reply_of_a_copy_that_is_lost_is_answered_again():
    chance = random.Random(1)
    with scene("llama") as here:
        alice = here.client()
        source = prefilled(alice.model, FIRST)
        wanted = next_logits(alice.model, THEN, copy.deepcopy(source))

        def lose(request):
            if isinstance(request, m.GenerateRequest) and chance.random() < 0.6:
                raise ConnectionLost("the reply went astray", retry_after_s=1e-3)

        alice.wire.after = lose
        for _ in range(3):
            assert torch.equal(next_logits(alice.model, THEN, copy.deepcopy(source)), wanted)
        sent = alice.sent(m.GenerateRequest)[2:]
        assert len(sent) > 3 and all(each.past == 9 for each in sent)


def test_copies_keep_the_session_of_their_source_open():
    clock = Clock()
    with scene("llama", clock, ttl_s=60.0, max_queue_delay_s=0.0) as here:
        alice = here.client()
        source = prefilled(alice.model, FIRST)
        for now in (40.0, 80.0, 120.0):
            clock.now = now
            next_logits(alice.model, THEN, copy.deepcopy(source))
        assert all(each.source for each in alice.sent(m.GenerateRequest)[1:])


# --- strangers --------------------------------------------------------------------------------


def request_of(session, **changes):
    plain = m.GenerateRequest(
        session=session, call=0, past=0, logits_to_keep=1, smashed_BTD=torch.ones(1, 3, 32)
    )
    return replace(plain, **changes)


def held(here, name):
    """A link of a client, its session of three tokens, and one that holds none."""
    remote = here.client(name).remote
    link = LocalLink(here.service, here.service.admit(name))
    full, empty = remote.open_cache(0), remote.open_cache(0)
    link.exchange(request_of(full))
    return link, full, empty


def test_a_session_of_another_client_is_refused_as_one_that_is_not_there():
    with scene("llama") as here:
        _, of_alice, _ = held(here, "alice")
        link, own, empty = held(here, "mallory")
        texts = []
        for source in (of_alice, "0" * 32):
            asked = request_of(empty, past=2, source=source, smashed_BTD=torch.ones(1, 1, 32))
            with pytest.raises(SessionLost, match="is gone") as caught:
                link.exchange(asked)
            texts.append(str(caught.value).replace(source, "?"))
            empty = here.client("mallory").remote.open_cache(0)
        assert texts[0] == texts[1]
        link.exchange(request_of(empty, past=2, source=own, smashed_BTD=torch.ones(1, 1, 32)))


NONSENSE = {
    "no tokens": (dict(past=0), ProtocolError, "past=0 .* names a source"),
    "a cache of the client": (dict(stateless=True), ProtocolError, "stateless=True names a source"),
    "no name": (dict(source="a b"), ProtocolError, "source='a b' must be 1 to 64 of"),
    "too many tokens": (dict(past=4), SessionLost, "holds 3 tokens, but this request continues 4"),
    "another precision": (dict(autocast="float16"), SessionLost, "computed with autocast=off"),
    "rows that are not there": (
        dict(rows_B=torch.tensor([1])),
        ProtocolError,
        r"rows \[1\] were asked for, but the cache holds 1",
    ),
    "a session that holds tokens": (dict(twice=True), ProtocolError, "holds 3 tokens already"),
}


@pytest.fixture(scope="module")
def healthy():
    with scene("llama") as here:
        yield here


@pytest.mark.parametrize("changes, error, text", NONSENSE.values(), ids=NONSENSE)
def test_a_copy_of_nonsense_is_a_typed_error(healthy, changes, error, text):
    link, source, empty = held(healthy, "mallory")
    call = 1 if (twice := changes.get("twice")) else 0
    changes = {} if twice else changes
    asked = request_of(source if twice else empty, call=call, past=2, source=source)
    with pytest.raises(error, match=text):
        link.exchange(replace(asked, smashed_BTD=torch.ones(1, 1, 32), **changes))
    link.exchange(request_of(source, call=2, past=3, smashed_BTD=torch.ones(1, 1, 32)))
