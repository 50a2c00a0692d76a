"""The tokens of prompts in a pass, with scripted times."""

from concurrent.futures import ThreadPoolExecutor

import torch

from fedsplit.trunk.call import Call, Kind
from fedsplit.trunk.kv_cache import SequenceCache
from fedsplit.trunk.pass_budget import SHORT, PromptBudget
from fedsplit.trunk.pass_queue import Pending
from tests.core.generating import scene
from tests.core.passes import counted
from tests.core.worlds import Clock, wait_until


def pending(tokens, client="bob", rows=1):
    return Pending(
        call=Call(kind=Kind.GENERATE, client=client),
        sequences=SequenceCache(cache=None),
        left_BTD=torch.zeros(rows, tokens, 1),
        since=0.0,
        num_bytes=0,
    )


def pieces(budget, waiting, *, passes=1, decoding=True, seconds=lambda tokens: 0.0):
    """The tokens of prompts in each of some passes, of which each takes `seconds` of them."""
    found = []
    for _ in range(passes):
        shares = budget.shares(
            waiting, decoding=decoding, room_bytes=1 << 30, can_divide=lambda _: True
        )
        found.append(sum(n * each.rows for each, n in shares if not each.is_short(budget.short)))
        budget.end(seconds(found[-1]))
    return found


def test_prompts_take_as_long_as_all_else_in_a_pass():
    """A token of a prompt costs 1 ms, and all else 40 ms."""
    waiting = [pending(1, "alice"), pending(5000)]
    found = pieces(PromptBudget(256), waiting, passes=40, seconds=lambda n: 0.04 + 0.001 * n)
    assert found[:7] == [0, 16, 20, 25, 31, 39, 40]
    # Later a pass measures the time of all else again.
    assert found[7:] == 26 * [40] + [0] + 6 * [40]


def test_a_slow_pass_halves_the_piece_at_most_and_a_fast_one_adds_a_quarter():
    budget, waiting = PromptBudget(256), [pending(1, "alice"), pending(5000)]
    pieces(budget, waiting, passes=9, seconds=lambda n: 0.04 + 0.001 * n)
    assert pieces(budget, waiting, passes=3, seconds=lambda n: 0.04 + n) == [40, 20, SHORT]
    assert pieces(budget, waiting, passes=6, seconds=lambda n: 0.04) == [16, 20, 25, 31, 39, 49]


def test_a_pass_is_filled_with_prompts_if_nobody_decodes():
    assert pieces(PromptBudget(256), [pending(5000)], decoding=False) == [256]
    assert pieces(PromptBudget(256), [pending(5000)], decoding=True) == [SHORT]


def test_short_requests_run_at_once_and_are_no_prompts():
    """Such as the drafts of a client, or the last tokens of a prompt."""
    waiting = [pending(SHORT, "alice"), pending(9, "carol"), pending(1, rows=20), pending(5000)]
    shares = PromptBudget(256).shares(
        waiting, decoding=True, room_bytes=1 << 30, can_divide=lambda _: True
    )
    assert [tokens for _, tokens in shares] == [SHORT, 9, 1]


def test_a_trunk_divides_a_prompt_by_the_time_of_its_passes():
    """A pass takes 32 ms, and a millisecond more for each token but the first."""
    clock = Clock()
    with scene("llama", clock, chunk_tokens=64) as here, ThreadPoolExecutor(1) as pool:
        alice, bob = (here.client(name).remote for name in ("alice", "bob"))
        generation = here.service.engine._generation

        def passed(_, inputs, __):
            clock.now += 0.032 + 0.001 * (inputs[0].shape[1] - 1)

        here.trunk.register_forward_hook(passed)
        talk = alice.new_cache()
        talk.carry(torch.randn(1, 1, 32), None, None)

        def beside(talk, tokens, alices):
            """Bob's tokens, which wait for each of alice's, because the clock stands still."""
            whole = pool.submit(bob.new_cache().carry, torch.randn(1, tokens, 32), None, None)
            wait_until(lambda: generation._waiting)
            for _ in range(alices):
                talk.carry(torch.randn(1, 1, 32), None, None)
            assert whole.result().shape == (1, tokens, 32)

        beside(talk, 1, alices=1)  # the trial of a shared pass
        with counted(here) as passes:
            beside(talk, 100, alices=5)
        assert passes == [17, 21, 26, 32, 9]
        # No pass waits for a session that has ended.
        del talk
        alice.end_generations()
        with counted(here) as passes:
            bob.new_cache().carry(torch.randn(1, 100, 32), None, None)
        assert passes == [64, 36]
