"""Many sessions in one pass: each gets the tokens that it gets alone."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fedsplit.trunk.shared_pass import SharedPass
from fedsplit.wire import messages as m
from tests.core.families import FAMILIES
from tests.core.generating import prompt, scene
from tests.core.passes import counted, segments

IN_TURNS = {"bloom", "falcon"}
"""Families that do not leave attention to an exchangeable function."""


def all_at_once(works):
    """What the works return, each in a thread of its own."""
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(work) for work in works]]


@pytest.mark.parametrize("family", FAMILIES)
def test_sessions_in_one_pass_come_out_as_alone(family):
    """Different lengths and batches, past the window where there is one."""
    with scene(family) as here, torch.no_grad():
        shared = SharedPass(here.trunk)
        steps = [[(1, 9), (3, 2), (2, 5)], [(1, 1), (3, 9), (2, 1)]]
        steps += 4 * [[(1, 1), (3, 1), (2, 1)]]
        caches = [[here.trunk.new_cache() for _ in range(3)] for _ in range(2)]
        past = [0, 0, 0]
        with counted(here) as passes:
            for seed, lengths in enumerate(steps):
                together = shared(segments(here.trunk, lengths, past, caches[0], seed))
                for i, one in enumerate(segments(here.trunk, lengths, past, caches[1], seed)):
                    (alone,) = shared([one])
                    assert torch.allclose(together[i], alone, atol=1e-5)
                past = [gone + tokens for gone, (_, tokens) in zip(past, lengths, strict=True)]
        assert (6 in passes[-4:]) == (family not in IN_TURNS)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2", "bloom", "olmoe"])
def test_many_at_once_get_the_tokens_that_each_gets_alone(family):
    """Greedily, with beams, drafts and in padded batches, all at the same time."""
    prompts = [prompt(12), prompt(20, seed=1), prompt(7, rows=3, seed=2, pad=2), prompt(9, seed=3)]
    asked = [{}, {"prompt_lookup_num_tokens": 3}, {}, {"num_beams": 2}]
    with scene(family, chunk_tokens=8, max_queue_delay_s=0.05) as here:
        wanted = [here.wanted(ids, **each) for ids, each in zip(prompts, asked, strict=True)]
        clients = [here.client(f"client-{i}") for i in range(4)]
        got = all_at_once(
            [
                lambda client=client, ids=ids, each=each: client.says(ids, **each)
                for client, ids, each in zip(clients, prompts, asked, strict=True)
            ]
        )
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_the_decode_steps_of_several_are_one_pass():
    """Four sessions of eight tokens take about as many passes as one session."""
    with scene("llama", max_queue_delay_s=1.0) as here:
        clients = [here.client(f"client-{i}") for i in range(4)]
        ready = threading.Barrier(4)

        def say(client, ids_BT):
            """Sends its second token when everybody does."""
            client.wire.before = lambda request: (
                ready.wait(10) if getattr(request, "past", 0) == 6 else None
            )
            return client.says(ids_BT)

        ids = [prompt(6, seed=seed) for seed in range(4)]
        with counted(here) as passes:
            got = all_at_once(
                [lambda c=c, i=i: say(c, i) for c, i in zip(clients, ids, strict=True)]
            )
        assert all(torch.equal(a, here.wanted(b)) for a, b in zip(got, ids, strict=True))
        assert passes.count(4) >= 4


def test_sessions_join_and_leave_in_the_middle():
    """Bob comes after Alice's third token, and is gone before her last."""
    with scene("llama", max_queue_delay_s=0.02) as here:
        alice, bob = here.client("alice"), here.client("bob")
        said: list[torch.Tensor] = []

        def third(request):
            if isinstance(request, m.GenerateRequest) and request.past == 14:
                thread = threading.Thread(target=lambda: said.append(bob.says(prompt(5, seed=9))))
                thread.start()
                threads.append(thread)

        threads: list[threading.Thread] = []
        alice.wire.before = third
        got = alice.says(prompt(12), max_new_tokens=40, min_new_tokens=40)
        threads[0].join()
        assert torch.equal(got, here.wanted(prompt(12), max_new_tokens=40, min_new_tokens=40))
        assert torch.equal(said[0], here.wanted(prompt(5, seed=9)))


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_others_go_on_between_the_pieces_of_a_long_prompt(family):
    """While a prompt of 60 tokens is taken in by eights, another session gets its tokens."""
    with scene(family, chunk_tokens=8) as here:
        alice, bob = here.client("alice"), here.client("bob")
        bobs_turn = threading.Event()
        order: list[str] = []
        alice.wire.after = lambda request: order.append("alice")
        bob.wire.after = lambda request: order.append("bob")

        def passed(*_):
            order.append("pass")
            time.sleep(0.02)  # as much as the way to a client and back takes

        run_pass = here.trunk.register_forward_hook(passed)

        def long_prompt():
            bobs_turn.wait(10)
            return bob.says(prompt(60, seed=4), max_new_tokens=2, min_new_tokens=2)

        alice.wire.before = lambda request: (
            bobs_turn.set() if getattr(request, "past", 0) == 13 else None
        )
        many = {"max_new_tokens": 60, "min_new_tokens": 60}
        got = all_at_once([lambda: alice.says(prompt(12), **many), long_prompt])
        run_pass.remove()
        assert torch.equal(got[0], here.wanted(prompt(12), **many))
        few = {"max_new_tokens": 2, "min_new_tokens": 2}
        assert torch.equal(got[1], here.wanted(prompt(60, seed=4), **few))
        opened, answered = [i for i, name in enumerate(order) if name == "bob"][:2]
        meanwhile = order[opened:answered]
        assert meanwhile.count("pass") >= 8
        assert meanwhile.count("alice") >= 2


def test_a_prompt_is_taken_in_by_pieces_of_the_budget():
    with scene("gpt2", chunk_tokens=8) as here:
        alice = here.client()
        here.client("bob").says(prompt(2))  # what is measured once, is
        with counted(here) as passes:
            alice.says(prompt(20, rows=2, pad=3))
        assert passes[:5] == [8, 8, 8, 8, 8]
        assert passes[5:] == 7 * [2]


def test_a_pass_that_breaks_off_costs_others_a_replay_only(caplog):
    """Whose fault it was is known after they went one by one."""
    with scene("llama", max_queue_delay_s=0.5) as here:
        alice, bob = here.client("alice"), here.client("bob")
        ready = threading.Barrier(2)

        def meet(request):
            if isinstance(request, m.GenerateRequest) and request.past == 14:
                ready.wait(10)

        bad = torch.full((1, 1, 32), 3e38)

        def break_off(module, inputs):
            if bool((inputs[0] == bad).any()):
                raise RuntimeError("the memory is used up")

        hook = here.trunk.register_forward_pre_hook(break_off)
        alice.wire.before = meet
        cache = bob.remote.new_cache()

        def misbehave():
            cache.carry(torch.ones(1, 14, 32), None, None)
            ready.wait(10)
            cache.carry(bad, None, None)

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(misbehave)
            got = alice.says(prompt(12))
            with pytest.raises(RuntimeError, match="the memory is used up"):
                future.result()
        hook.remove()
        assert torch.equal(got, here.wanted(prompt(12)))
        assert "a pass of generation failed" in caplog.text
        assert torch.equal(bob.says(prompt(5)), here.wanted(prompt(5)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["greedy", "beams", "lookup", "stateless"])
def test_too_many_for_the_room_replay_and_get_their_tokens(mode):
    """Four in the room of two; whoever is evicted comes again."""
    asked = {"beams": {"num_beams": 2}, "lookup": {"prompt_lookup_num_tokens": 3}}.get(mode, {})
    with scene("gemma2") as here:
        here.client().says(prompt(12), **asked)
        room = 2 * here.service.engine.cache_bytes
    texts = [prompt(6, seed=seed).repeat(1, 2) for seed in range(4)]
    with scene("gemma2", cache_bytes=room, chunk_tokens=5) as here:
        kv = "client" if mode == "stateless" else "server"
        clients = [here.client(f"client-{i}", kv=kv) for i in range(4)]
        got = all_at_once(
            [
                lambda client=client, ids=ids: client.says(ids, **asked)
                for client, ids in zip(clients, texts, strict=True)
            ]
        )
        wanted = [here.wanted(ids, **asked) for ids in texts]
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_families_with_other_states_take_turns(caplog):
    with scene("qwen3_next", max_queue_delay_s=0.05) as here:
        clients = [here.client(name) for name in ("alice", "bob")]
        ids = [prompt(8, seed=1), prompt(11, seed=2)]
        got = all_at_once([lambda c=c, i=i: c.says(i) for c, i in zip(clients, ids, strict=True)])
        assert all(torch.equal(a, here.wanted(b)) for a, b in zip(got, ids, strict=True))
        assert "cannot serve several sessions in one pass; they take turns" in caplog.text


def test_who_leaves_is_not_waited_for():
    with scene("llama", max_queue_delay_s=600.0) as here, ThreadPoolExecutor(1) as pool:
        alice, bob = here.client("alice"), here.client("bob")
        caches = [alice.remote.new_cache(), bob.remote.new_cache()]
        caches[0].carry(torch.ones(1, 2, 32), None, None)
        sent = threading.Event()
        bob.wire.before = lambda request: (
            sent.set() if isinstance(request, m.GenerateRequest) else None
        )
        waits = pool.submit(caches[1].carry, torch.ones(1, 1, 32), None, None)
        sent.wait(10)
        del caches[0]
        alice.remote.end_generations()
        assert waits.result(20).shape == (1, 1, 32)
