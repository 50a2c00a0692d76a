"""Clients that attack the training of a trunk, and the honest clients beside them."""

import math
from dataclasses import replace

import pytest
import torch

from fedsplit import errors
from fedsplit.link import LocalLink
from fedsplit.spec import GuardSpec, PolicySpec, TrainSpec
from fedsplit.trunk.norm_guard import GuardCounts
from fedsplit.wire import messages as m
from tests.core.requests import ask, backward_of, contribute, forward_of, prepare, step, step_of
from tests.core.worlds import Clock, batch, same, small_run, world

GUARDED = small_run(guard=GuardSpec(after=4))
"""A run whose guard begins after two steps of two clients."""
ALONE = replace(GUARDED, clients=1)
"""The same for a run of one client, whose gradients are compared with its own."""


def honest_steps(here, first, number):
    """Let a and b take steps in turns; no thread is needed while no one else is awaited."""
    for seed in range(first, first + number):
        for place, name in enumerate("ab"):
            step(here.members[name], 2 * seed + place)
    here.service.close()


def trained(config, attack=None, run=GUARDED):
    """The trunk after four steps of a and b, of which the last two follow an attack by m."""
    clock = Clock()
    with world(config, run, clock) as here:
        for name in "ab":
            here.add(name).trunk.open()
        honest_steps(here, 0, 2)
        if attack:
            attack(here, clock)
        honest_steps(here, 2, 2)
        assert here.service.engine.version == 4
        return here.trunk_weights()


# --- gradients that are out of proportion -----------------------------------------------------


def send(here, call, scale):
    """Send a forward, a backward with gradients of a size, and a step."""
    member = here.members.get("m") or here.add("m")
    if not member.trunk._session:
        member.trunk.open()
    request = forward_of(member, call)
    for each in (request, backward_of(request, scale), step_of(request)):
        ask(here, "m", each)


REFUSED = {
    "nan": (float("nan"), errors.NonFinite),
    "inf": (float("inf"), errors.NonFinite),
    "1e38": (1e38, errors.NonFinite),
    "x1e6": (1e6, errors.GradExploded),
}


@pytest.mark.parametrize("attack", REFUSED)
def test_a_client_that_sends_such_gradients_is_excluded_and_changes_no_bit(tiny_llama, attack):
    scale, error = REFUSED[attack]

    def attack_(here, clock):
        for call in range(3):
            with pytest.raises(error):
                send(here, call, scale)
            if call < 2:
                here.members["m"].trunk.open(first_call=call + 1)
        # No barrier waits for it, and it cannot come back before its time.
        with pytest.raises(errors.Quarantined, match="quarantine for 60 s") as caught:
            here.members["m"].trunk.open()
        assert caught.value.retry_after_s == 60.0
        here.service.expect(["m"], round=1, at_once=1, close_after=1)
        record = here.service.engine.training.quarantine.records["m"]
        assert (record.refused, record.quarantines) == (3, 1)
        assert here.service.engine.guard_counts == GuardCounts(refused=3, quarantines=1)

    assert same(trained(tiny_llama(), attack_), trained(tiny_llama()))


def test_a_client_comes_back_after_its_quarantine_and_the_next_one_is_twice_as_long(tiny_llama):
    def attack(here, clock):
        for seconds in (60.0, 120.0):
            for call in range(3):
                with pytest.raises(errors.NonFinite):
                    send(here, call, float("nan"))
                if call < 2:
                    here.members["m"].trunk.open(first_call=call + 1)
            with pytest.raises(errors.Quarantined) as caught:
                here.members["m"].trunk.open()
            assert caught.value.retry_after_s == seconds
            clock.now += seconds
            here.members["m"].trunk.open()
        here.members["m"].trunk.close()

    assert same(trained(tiny_llama(), attack), trained(tiny_llama()))


@pytest.mark.parametrize("part", ["smashed", "gradient"])
@pytest.mark.parametrize(
    ("autocast", "is_excluded"), [("", True), ("bfloat16", True), ("float16", False)]
)
def test_an_overflow_excludes_a_client_unless_its_forwards_are_in_float16(
    tiny_llama, part, autocast, is_excluded
):
    with world(tiny_llama()) as here:
        trunk = here.add("m").trunk
        for call in range(3):
            trunk.open(first_call=call)
            request = forward_of(here.members["m"], call, autocast=autocast)
            if part == "smashed":
                request = replace(request, smashed_BTD=request.smashed_BTD / 0)
            with pytest.raises(errors.NonFinite):
                ask(here, "m", request)
                ask(here, "m", backward_of(request, float("inf")))
        assert here.service.engine.training.is_excluded("m") is is_excluded


def test_a_client_in_float16_that_overflows_without_end_is_excluded_too(tiny_llama):
    with world(tiny_llama()) as here:
        trunk, training = here.add("m").trunk, here.service.engine.training
        for call in range(32 + 3):
            assert not training.is_excluded("m")
            trunk.open(first_call=call)
            request = forward_of(here.members["m"], call, autocast="float16")
            with pytest.raises(errors.NonFinite):
                ask(here, "m", replace(request, smashed_BTD=request.smashed_BTD / 0))
        assert training.is_excluded("m")


def infinite_forward(member, call):
    request = forward_of(member, call)
    return replace(request, smashed_BTD=request.smashed_BTD / 0)


def test_no_client_waits_for_the_virtual_time_of_one_that_is_excluded(tiny_llama):
    """It keeps its session open and says nothing, or goes on with calls that are refused."""
    policy = PolicySpec(kind="async", sim_slowdown={"client-0": 5.0})
    with world(tiny_llama(), replace(GUARDED, policy=policy), Clock()) as here:
        hostile, honest = here.add("client-0"), here.add("client-1")
        here.service.expect(list(here.members), round=0, at_once=2, close_after=2)
        for call in range(3):
            hostile.trunk.open(first_call=call)
            with pytest.raises(errors.NonFinite):
                ask(here, "client-0", infinite_forward(hostile, call))
        honest.trunk.open()
        for seed in range(8):
            step(honest, seed)
        assert here.service.now() == 8.0
        with pytest.raises(errors.Quarantined):
            ask(here, "client-0", infinite_forward(hostile, 3))
        here.service.expect(["client-0"], round=1, at_once=1, close_after=1)
        for seed in range(8):
            step(honest, seed)
        assert here.service.now() == 16.0


def first_step_of_three(config, scale):
    """The trunk after the first step of a, b and m, and the guard's counts."""
    with world(config) as here:
        here.service.expect(tuple("abm"), round=0, at_once=3, close_after=3)
        for name in "abm":
            member = here.add(name)
            member.trunk.open()
            request = forward_of(member)
            size = scale if name == "m" else 1e-4
            for each in (request, backward_of(request, size), step_of(request)):
                ask(here, name, each)
        here.service.close()
        return here.trunk_weights(), here.service.engine.guard_counts


def test_the_gradients_of_a_first_step_are_compared_with_one_another(tiny_llama):
    """None is refused, as its client has its reply already."""
    found, counts = first_step_of_three(tiny_llama(), 1e2)
    wanted, none = first_step_of_three(tiny_llama(), 1e-3)
    torch.testing.assert_close(found, wanted)
    assert (counts, none) == (GuardCounts(clipped=1), GuardCounts())


def test_a_gradient_over_ten_times_the_median_is_clipped_to_it(tiny_llama):
    """Against the norm that the trunk moves by, with plain SGD and one client."""
    with world(tiny_llama(), ALONE) as here:
        norms = []
        for call, scale in enumerate((1e-4, 1e-4, 1e-4, 1e-4, 5e-3)):
            before = here.trunk_weights()
            send(here, call, scale)
            here.service.close()
            moved = [p - before[name] for name, p in here.trunk_weights().items()]
            norms.append(float(torch.stack([each.norm() for each in moved]).norm()))
        # Of one client, the median is its last norm, or an earlier one that was larger.
        assert norms[4] == pytest.approx(10 * norms[3], rel=1e-2)
        assert here.service.engine.training.quarantine.records["m"].clipped == 1


@pytest.mark.parametrize(
    ("most", "counts"), [(0.1, GuardCounts()), (5.0, GuardCounts()), (20.0, GuardCounts(clipped=1))]
)
def test_a_gradient_is_compared_as_the_clipping_of_the_run_leaves_it(tiny_llama, most, counts):
    """An honest batch with a rare token may have a thousand times the usual norm before that."""
    with world(tiny_llama()) as here:
        member = here.add("m")
        member.trunk.open()
        request = forward_of(member)
        ask(here, "m", request)
        usual = math.sqrt(ask(here, "m", backward_of(request, 1e-4)).trunk_sq_norm)
    run = replace(ALONE, train=replace(ALONE.train, clip_norm=most * usual))
    with world(tiny_llama(), run) as here:
        for call, scale in enumerate((1e-4, 1e-4, 1e-4, 1e-4, 0.1)):
            send(here, call, scale)
        here.service.close()
        assert here.service.engine.guard_counts == counts


def test_a_resumed_trunk_has_the_norms_of_the_run(tiny_llama):
    with world(tiny_llama(), ALONE) as here:
        for call in range(4):
            send(here, call, 1e-4)
        state = here.service.engine.state()
    with world(tiny_llama(), ALONE) as here:
        here.service.engine.load_state(state)
        with pytest.raises(errors.GradExploded):
            send(here, 0, 1.0)


class LoudLink(LocalLink):
    """A link over which every gradient becomes a million times as large from some call on."""

    def __init__(self, service, token, first):
        super().__init__(service, token)
        self.first = first

    def exchange(self, request):
        if isinstance(request, m.BackwardRequest) and request.call >= self.first:
            request = replace(request, grad_trunk_out_BTD=1e6 * request.grad_trunk_out_BTD)
        return super().exchange(request)


def test_a_trainer_skips_a_batch_whose_gradient_is_refused(tiny_llama):
    with world(tiny_llama(), ALONE) as here:
        loud = here.add("m", LoudLink(here.service, here.service.admit("m"), first=4))
        assert loud.trainer.fit([[batch(seed)] for seed in range(6)]).skipped == 2
        assert loud.trainer.steps == 4
        # The third refusal in a row is the first one of this session.
        with pytest.raises(errors.Quarantined, match="m is in quarantine for 60 s"):
            loud.trainer.fit([[batch(seed)] for seed in range(6, 12)])


def test_a_trainer_stops_after_three_refusals_in_a_row(tiny_llama):
    with world(tiny_llama(), ALONE) as here:
        loud = here.add("m", LoudLink(here.service, here.service.admit("m"), first=4))
        with pytest.raises(errors.GradExploded, match="contribution of m has norm"):
            loud.trainer.fit([[batch(seed)] for seed in range(12)])
        assert loud.trainer.steps == 4


def test_a_replica_that_its_client_destroyed_counts_as_the_mean_before(tiny_llama):
    with world(tiny_llama(), replicas=True) as here:
        before = here.trunk_weights()
        for name in "ab":
            contribute(here, name, prepare(here, name, seed=ord(name))[0])
        send(here, 0, 1e6)
        here.service.close()
        replicas = here.service.engine.training._replicas
        a, b = (
            {k: v.clone() for k, v in replicas.of(each).versions.values().items()} for each in "ab"
        )
        third = 1 / 3
        here.service.average(dict.fromkeys("abm", third))
        for name, value in here.trunk_weights().items():
            assert torch.equal(value, a[name] * third + b[name] * third + before[name] * third)


# --- weights and places -----------------------------------------------------------------------


def after_step_of_three(config, run, *, backwards=1, **claims):
    """The trunk after a step of a, b and m, and the place in the schedule."""
    with world(config, run) as here:
        here.service.expect(tuple("abm"), round=0, at_once=3, close_after=3)
        found = {name: prepare(here, name, seed=ord(name))[0] for name in "abm"}
        for call in range(1, backwards):
            found["m"] = prepare(here, "m", call, seed=ord("m"))[0]
        contribute(here, "a", found["a"])
        contribute(here, "b", found["b"])
        contribute(here, "m", found["m"], **claims)
        return here.trunk_weights(), here.service.engine.steps


def test_a_hundred_backwards_weigh_no_more_than_a_step_of_the_run(tiny_llama):
    """Clipped, as the gradients of a hundred backwards have a hundred times the norm."""
    run = small_run(train=replace(small_run().train, clip_norm=0.01))
    claimed, _ = after_step_of_three(tiny_llama(), run, backwards=100, num_tokens=2400)
    honest, _ = after_step_of_three(tiny_llama(), run, backwards=100, num_tokens=22)
    assert same(claimed, honest)


def test_a_step_at_the_end_of_the_schedule_moves_no_one_there(tiny_llama):
    run = small_run(train=TrainSpec(batch_size=2, optimizer="sgd", lr=0.1, clip_norm=0.0))
    end = run.train.total_steps
    claimed, steps = after_step_of_three(tiny_llama(), run, step=end)
    honest, _ = after_step_of_three(tiny_llama(), run, step=0)
    assert same(claimed, honest)
    assert steps == 1


@pytest.mark.parametrize("combine", ["median", "trimmed"])
def test_a_steady_factor_of_nine_does_not_move_a_robust_combination(tiny_llama, combine):
    policy = PolicySpec(combine=combine)
    with world(tiny_llama(), small_run(policy=policy)) as here:
        here.service.expect(tuple("abm"), round=0, at_once=3, close_after=3)
        before = here.trunk_weights()
        found = {name: prepare(here, name, seed=ord(name)) for name in "abm"}
        for name in "abm":
            contribute(here, name, found[name][0], loss_scale=1.0)
        after = here.trunk_weights()
    for name in after:
        middle = torch.stack([grads[name] for _, grads in found.values()]).median(0).values
        torch.testing.assert_close(after[name] - before[name], -0.1 * middle)
