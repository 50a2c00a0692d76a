"""Policies at work: what they do to the trunk's weights, to waiting clients and to dead ones."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fedsplit import errors
from fedsplit.client.stats import FitStats
from fedsplit.spec import PolicySpec, WireSpec
from tests.core.requests import ask, backward_of, contribute, forward_of, prepare
from tests.core.worlds import batch, same, small_run, wait_until, world

SLOW = {"client-2": 3.0}
VIRTUAL = {
    "sync": PolicySpec(kind="sync", sim_slowdown=SLOW),
    "async": PolicySpec(kind="async", sim_slowdown=SLOW),
    "quorum": PolicySpec(kind="quorum", quorum=2, sim_slowdown=SLOW),
    "strict quorum": PolicySpec(kind="quorum", quorum=2, late="refuse", sim_slowdown=SLOW),
    "strict async": PolicySpec(kind="async", max_staleness=1, sim_slowdown=SLOW),
}
LR = 0.1


# --- on the virtual clock --------------------------------------------------------------------


@dataclass
class Outcome:
    """All numbers of a round."""

    stats: list[FitStats]
    trunk: dict[str, Tensor]
    version: int
    now: float


def groups(number: int, steps: int):
    return [[batch(100 * number + 2 * i), batch(100 * number + 2 * i + 1)] for i in range(steps)]


def play(config, policy, *, clients: int = 3, steps: int = 4, order: int = 1) -> Outcome:
    """One round of all clients, each in a thread, begun in an order that must not matter."""
    with world(config, small_run(policy=policy, clients=clients)) as here:
        names = [f"client-{i}" for i in range(clients)]
        for name in names:
            here.add(name)
        here.service.expect(names, round=0, at_once=clients, close_after=clients)
        with ThreadPoolExecutor(clients) as pool:
            work = {
                i: pool.submit(here.members[names[i]].trainer.fit, groups(i, steps))
                for i in range(clients)[::order]
            }
        stats = [work[i].result() for i in range(clients)]
        engine = here.service.engine
        assert (here.service.num_sessions, engine.stashed_bytes, engine.num_waiting) == (0, 0, 0)
        return Outcome(stats, here.trunk_weights(), engine.version, here.service.now())


@pytest.mark.slow
@pytest.mark.parametrize("policy", VIRTUAL.values(), ids=list(VIRTUAL))
def test_the_same_numbers_in_every_run(tiny_gpt2, policy):
    config = tiny_gpt2(resid_pdrop=0.1)
    once, again = (play(config, policy, order=order) for order in (1, -1))
    assert (once.stats, once.version, once.now) == (again.stats, again.version, again.now)
    assert same(once.trunk, again.trunk)


def test_sync_on_the_virtual_clock_is_sync_on_the_real_one(tiny_llama):
    real, virtual = (play(tiny_llama(), PolicySpec(sim_slowdown=slow)) for slow in ({}, SLOW))
    assert virtual.stats == real.stats
    assert same(virtual.trunk, real.trunk)


@pytest.mark.parametrize(("kind", "version", "end"), [("sync", 4, 12.0), ("async", 12, 12.0)])
def test_virtual_time_and_versions(tiny_llama, kind, version, end):
    outcome = play(tiny_llama(), VIRTUAL[kind])
    assert (outcome.version, outcome.now) == (version, end)
    assert all(stats.steps == 4 and stats.repeated == 0 for stats in outcome.stats)


def test_time_stands_still_when_enough_have_left(tiny_llama):
    run = small_run(policy=VIRTUAL["async"], clients=3)
    with world(tiny_llama(), run) as here, ThreadPoolExecutor(3) as pool:
        names = [f"client-{i}" for i in range(3)]
        for name in names:
            here.add(name)
        here.service.expect(names, round=0, at_once=3, close_after=1)
        quick = pool.submit(here.members["client-0"].trainer.fit, groups(0, 1))
        others = [
            pool.submit(here.members[name].trainer.fit, groups(i, 2))
            for i, name in enumerate(names[1:], 1)
        ]
        quick.result()
        wait_until(lambda: here.service.engine.num_waiting == 2)
        assert (here.service.now(), here.service.engine.version) == (1.0, 1)
        here.service.expect([], round=0, at_once=0, close_after=9, until=2.5)
        others[0].result()
        wait_until(lambda: here.service.now() == 2.5)
        assert not others[1].done()
        here.service.expect([], round=0, at_once=0, close_after=9)
        others[1].result()
        assert (here.service.now(), here.service.engine.version) == (6.0, 5)


def test_one_that_is_expected_and_never_comes_holds_time_up_for_a_while_only(tiny_llama):
    run = small_run(policy=VIRTUAL["sync"], clients=3)
    run = replace(run, wire=replace(run.wire, call_deadline_s=0.2))
    with world(tiny_llama(), run) as here:
        here.service.expect(["client-0", "client-1"], round=0, at_once=2, close_after=2)
        assert here.add("client-1").trainer.fit(groups(1, 2)).steps == 2


def test_one_that_is_released_holds_nobody_up(tiny_llama):
    with world(tiny_llama(), small_run(policy=VIRTUAL["sync"], clients=3)) as here:
        here.service.expect(["client-0", "client-1"], round=0, at_once=2, close_after=2)
        here.service.release("client-0")
        assert here.add("client-1").trainer.fit(groups(1, 2)).steps == 2


# --- what a step does ------------------------------------------------------------------------


def moved(before, *terms):
    """Weights after plain SGD with these (factor, gradient)."""
    weights = {name: value.clone() for name, value in before.items()}
    for factor, gradient in terms:
        for name, value in gradient.items():
            weights[name] -= factor * value
    return weights


def close(a, b):
    return all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def policy_run(**policy):
    return small_run(policy=PolicySpec(**policy))


def test_async_steps_at_once_and_scales_the_rate_of_what_is_stale(tiny_llama):
    with world(tiny_llama(), policy_run(kind="async")) as here:
        before = here.trunk_weights()
        (first, a), (second, b) = prepare(here, "a", seed=1), prepare(here, "b", seed=2)
        contribute(here, "a", first)
        assert here.service.engine.version == 1
        contribute(here, "b", second)
        assert here.service.engine.version == 2
        assert close(here.trunk_weights(), moved(before, (LR, a), (LR * 2**-0.5, b)))


def test_a_quorum_discounts_the_late_beside_the_others(tiny_llama):
    with world(tiny_llama(), policy_run(kind="quorum", quorum=2)) as here:
        requests = [prepare(here, name, seed=i) for i, name in enumerate("abc")]
        for name, (request, _) in zip("ab", requests, strict=False):
            contribute(here, name, request)
        assert here.service.engine.version == 1
        before, (fresh, a), (late, c) = here.trunk_weights(), prepare(here, "a", 1, 9), requests[2]
        contribute(here, "a", fresh, num_tokens=20)
        contribute(here, "c", late, num_tokens=10)
        share = 10 * 2**-0.5 / (20 + 10 * 2**-0.5)
        assert here.service.engine.version == 2
        assert close(here.trunk_weights(), moved(before, (LR * (1 - share), a), (LR * share, c)))


STALE = [dict(kind="quorum", quorum=1, late="refuse"), dict(kind="async", max_staleness=0)]


@pytest.mark.parametrize("policy", STALE, ids=["quorum", "async"])
def test_what_is_too_old_is_refused_and_changes_nothing(tiny_llama, policy):
    with world(tiny_llama(), policy_run(**policy)) as here:
        (first, _), (second, _) = prepare(here, "a"), prepare(here, "b")
        contribute(here, "a", first)
        before = here.trunk_weights()
        with pytest.raises(errors.StaleVersion, match="with version 0, but the trunk is at 1"):
            contribute(here, "b", second)
        assert same(here.trunk_weights(), before)


def test_all_forwards_of_a_step_run_on_one_version(tiny_llama):
    with world(tiny_llama(), policy_run(kind="async")) as here:
        prepare(here, "slow")
        request, _ = prepare(here, "quick")
        contribute(here, "quick", request)
        slow = here.members["slow"]
        assert ask(here, "slow", forward_of(slow, call=1)).version == 0
        assert ask(here, "quick", forward_of(here.members["quick"], call=1)).version == 1


@pytest.mark.parametrize(("clip", "norm"), [("parts", 0.5), ("global", 0.5 * 1e-3)])
def test_clipping_by_each_part_or_by_all(tiny_llama, clip, norm):
    run = policy_run(kind="async")
    run = replace(run, train=replace(run.train, clip_norm=0.5, clip=clip))
    with world(tiny_llama(), run) as here:
        before = here.trunk_weights()
        request, gradient = prepare(here, "a")
        sq_norm = sum(float(value.square().sum()) for value in gradient.values())
        assert sq_norm > 0.5**2
        contribute(here, "a", request, client_sq_norm=(1e6 - 1) * sq_norm)
        after = here.trunk_weights()
    went = sum(float((after[name] - before[name]).square().sum()) for name in before) ** 0.5
    assert went == pytest.approx(LR * norm, rel=1e-2)


# --- one that dies ---------------------------------------------------------------------------


DEADLY = {
    "sync": dict(kind="sync", deadline_s=0.2),
    "async": dict(kind="async", deadline_s=0.2),
    "quorum": dict(kind="quorum", quorum=2, deadline_s=0.2),
    "virtual sync": dict(kind="sync", deadline_s=0.2, sim_slowdown=SLOW),
    "virtual async": dict(kind="async", deadline_s=0.2, sim_slowdown=SLOW),
}


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [False, True], ids=["shared", "replicas"])
@pytest.mark.parametrize("policy", DEADLY.values(), ids=list(DEADLY))
def test_one_that_dies_leaves_no_session_and_no_stash(tiny_llama, policy, replicas):
    run = small_run(policy=PolicySpec(**policy), clients=3)
    with world(tiny_llama(), run, replicas=replicas) as here:
        names = [f"client-{i}" for i in range(3)]
        here.service.expect(names, round=0, at_once=3, close_after=3)
        doomed, *others = (here.add(name) for name in names)
        doomed.trunk.open()
        request = forward_of(doomed)
        ask(here, names[0], request), ask(here, names[0], backward_of(request))
        ask(here, names[0], forward_of(doomed, call=1))
        assert here.service.engine.stashed_bytes > 0
        here.service.disconnected(doomed.trunk._named_session())
        with ThreadPoolExecutor(2) as pool:
            stats = list(pool.map(lambda m: m.trainer.fit(groups(1, 2)), others))
        assert [each.steps for each in stats] == [2, 2]
        wait_until(lambda: here.service.num_sessions == 0)
        engine = here.service.engine
        assert (engine.stashed_bytes, engine.num_waiting) == (0, 0)
        versions = engine.training._replicas.of(names[0]).versions
        assert not versions._pins, "and no version of the parameters"


def test_a_client_is_released_while_virtual_time_stands_still(tiny_gpt2):
    policy = PolicySpec(kind="async", sim_slowdown={"client-0": 2.0})
    with world(tiny_gpt2(), small_run(policy=policy, wire=WireSpec(call_deadline_s=5.0))) as here:
        here.service.expect(["client-0", "client-1"], round=0, at_once=2, close_after=1)
        here.service.release("client-0")  # and with that one departure time stands still
        here.service.release("client-1")
        assert here.service.engine.num_waiting == 1
        here.service.expect([], round=0, at_once=0, close_after=1)
        wait_until(lambda: here.service.engine.num_waiting == 0)
