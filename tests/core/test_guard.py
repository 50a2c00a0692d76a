"""The norm guard and the quarantine, which have no thread, no tensor and no clock."""

import math

import pytest
import torch

from fedsplit.errors import ConfigError, GradExploded, Quarantined
from fedsplit.spec import DataSpec, GuardSpec, PolicySpec, RunSpec, TrainSpec
from fedsplit.trunk.combine import COMBINATIONS
from fedsplit.trunk.guard import counted
from fedsplit.trunk.norm_guard import (
    Bounds,
    GuardCounts,
    NormGuard,
    Quarantine,
    require_in_proportion,
)
from fedsplit.trunk.schedule import Schedule
from fedsplit.wire.messages import StepRequest
from strategies.splitfed_v1 import ReplicaUpdate

SPEC = GuardSpec(window=3, after=3)
OFF = GuardSpec(clip_above=0, refuse_above=0, quarantine_s=0)
NONE = (math.inf, math.inf)

BOUNDS = {
    "too few": (SPEC, "a1 b1", NONE),
    "from the third on": (SPEC, "a1 b2 c9", (20.0, 200.0)),
    "a client counts once": (SPEC, "a1 b1 c9 c9 c9 c9", (10.0, 100.0)),
    "one of two": (SPEC, "a1 b9 a1 b9", (10.0, 100.0)),
    "the last clients": (SPEC, "x0 y0 z0 a1 b2 c3", (20.0, 200.0)),
    "most are 0": (SPEC, "a0 b0 c5", NONE),
    "off": (OFF, " ".join(["a1"] * 60), NONE),
    "only refused": (GuardSpec(clip_above=0), " ".join(["a1"] * 60), (math.inf, 100.0)),
}


@pytest.mark.parametrize("case", BOUNDS)
def test_bounds_are_multiples_of_the_median_of_the_clients_norms(case):
    spec, norms, (clip, refuse) = BOUNDS[case]
    guard = NormGuard(spec, clients=1, memory=10**9)
    for client, norm in norms.split():  # a letter and a digit
        guard.add(client, float(norm))
    assert guard.bounds_of("a").clip == pytest.approx(clip)
    assert guard.bounds_of("a").refuse == pytest.approx(refuse)
    resumed = NormGuard(spec, clients=1, memory=10**9)
    resumed.load_state(guard.state())
    assert resumed.bounds_of("a") == guard.bounds_of("a")


@pytest.mark.parametrize("norm", [1e-6, 1e6])
def test_a_client_that_is_first_neither_refuses_all_others_nor_escapes_later(norm):
    guard = NormGuard(GuardSpec(after=1), clients=4, memory=10**9)
    for _ in range(30):
        guard.add("m", norm)
    assert guard.bounds_of("a") == Bounds()
    guard.add("a", 1.0)
    assert guard.bounds_of("a") == Bounds(), "of two, nobody knows which one is right"
    assert guard.bounds_of("b").clip >= 10.0
    guard.add("b", 1.0)
    for client in "abcm":
        assert guard.bounds_of(client) == Bounds(clip=10.0, refuse=100.0)


def test_a_client_that_is_third_is_compared_with_the_two_before_it():
    guard = NormGuard(GuardSpec(after=1), clients=4, memory=10**9)
    guard.add("a", 0.01)
    guard.add("b", 1.0)
    assert guard.bounds_of("m") == Bounds(clip=10.0, refuse=100.0)


def test_a_median_is_halved_in_the_time_of_a_round():
    """So the jump at the start of a round passes that begins with averaged weights."""
    guard = NormGuard(SPEC, clients=3, memory=30)
    for _ in range(3):
        for norm in (4.0, 0.1, 0.001, 0.0001):
            assert norm <= guard.bounds_of("a").clip
            for client in "abc":
                guard.add(client, norm)
    for _ in range(30):
        guard.add("a", 0.0001)
    assert guard.bounds_of("a").clip == pytest.approx(10 * 4.0 / 2 ** (38 / 30))


def test_one_over_the_bound_is_refused_and_the_bound_itself_is_not():
    require_in_proportion("m", 100.0, Bounds(clip=10.0, refuse=100.0))
    with pytest.raises(GradExploded, match="of m has norm 101, but .* at most 100 is accepted"):
        require_in_proportion("m", 101.0, Bounds(clip=10.0, refuse=100.0))


def test_a_client_that_is_refused_in_a_row_is_excluded_for_twice_as_long_each_time():
    quarantine, now, times = Quarantine(GuardSpec(), 9), 0.0, []
    for _ in range(8):
        assert [quarantine.refuse("m", now) for _ in range(2)] == [0.0, 0.0]
        times.append(quarantine.refuse("m", now))
        with pytest.raises(Quarantined, match="m is in quarantine for") as caught:
            quarantine.require_free("m", now + 1.0)
        assert caught.value.retry_after_s == times[-1] - 1.0
        quarantine.require_free("a", now)
        now += times[-1]
        quarantine.require_free("m", now)
    assert times == [60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 3600.0, 3600.0]


def test_an_accepted_contribution_ends_a_row_of_refusals():
    quarantine = Quarantine(GuardSpec(), 9)
    for _ in range(5):
        assert not quarantine.refuse("m", 0.0) and not quarantine.refuse("m", 0.0)
        quarantine.accept("m", clipped=True)
    record = quarantine.records["m"]
    assert (record.refused, record.clipped, record.quarantines) == (10, 5, 0)


def test_a_client_that_was_clipped_three_times_in_a_row_is_refused_instead():
    quarantine, bounds = Quarantine(GuardSpec(), 9), Bounds(clip=10.0, refuse=100.0)
    found = []
    for clipped in (True, True, False, True, True, True):
        found.append(quarantine.bounds_of("m", bounds))
        quarantine.accept("m", clipped=clipped)
    assert found == [bounds] * 6
    assert quarantine.bounds_of("m", bounds) == Bounds(clip=10.0, refuse=10.0)
    quarantine.refuse("m", 0.0)
    assert quarantine.bounds_of("m", bounds) == Bounds(clip=10.0, refuse=10.0), "after a refusal"
    assert quarantine.bounds_of("a", bounds) == bounds


def test_ever_new_names_leave_no_more_records_than_clients_are_remembered():
    quarantine = Quarantine(GuardSpec(), 2)
    for number in range(5):
        for _ in range(3):
            quarantine.refuse(f"m{number}", 0.0)
    assert list(quarantine.records) == ["m3", "m4"]
    assert quarantine.counts == GuardCounts(refused=15, quarantines=5)
    quarantine.accept("m5", clipped=True)
    assert not quarantine.is_free("m4", 0.0) and quarantine.is_free("m3", 0.0)


def test_without_a_time_there_is_no_quarantine():
    quarantine = Quarantine(OFF, 9)
    assert not any(quarantine.refuse("m", 0.0) for _ in range(9))
    quarantine.require_free("m", 0.0)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (dict(after=0), "guard.after=0 is too small"),
        (dict(refuse_above=5.0), "guard.refuse_above=5.0 is below guard.clip_above=10.0"),
    ],
)
def test_a_guard_that_could_not_work_is_refused(fields, text):
    with pytest.raises(ConfigError, match=text):
        GuardSpec(**fields)


def test_the_guards_settings_are_the_servers_own():
    assert RunSpec(guard=OFF).fingerprint == RunSpec().fingerprint


# --- weights and places -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "data", "most"),
    [
        ("causal_lm", "embedded", 2 * 3 * 11),
        ("sequence_classification", "embedded", 2 * 3),
        ("image_classification", "digits", 2 * 3),
    ],
)
def test_a_step_weighs_at_most_what_a_client_of_the_run_processes(task, data, most):
    train = TrainSpec(batch_size=2, accumulation=3)
    run = RunSpec(task=task, data=DataSpec(kind=data, sequence_length=12), train=train)
    for claimed in (1, most, most + 1, 10**9):
        step = StepRequest(session="s", call=0, step=0, num_tokens=claimed, client_sq_norm=0.0)
        assert counted(step, run).num_tokens == min(claimed, most)


def test_a_client_may_count_fewer_steps_than_the_trunk_but_no_more(caplog):
    schedule = Schedule()
    places = []
    # It repeats its steps from the first one, and then claims to be at the end.
    for claimed in (0, 1, 2, 1, 2, 240):
        places.append(schedule.place_of("m", claimed))
        schedule.accepted("m", places[-1])
        schedule.taken(places[-1])
    assert places == [0, 1, 2, 1, 2, 3]
    assert "m counts 240 steps, but the trunk accepted 3" in caplog.text
    assert schedule.place_of("new", 4) == 4 == schedule.position, "it may be as far as the others"


# --- combinations -----------------------------------------------------------------------------


def combined(name, *values):
    gradients = [{} if value is None else {"w": torch.tensor([value, -value])} for value in values]
    result = COMBINATIONS[name](gradients, [1.0 / len(values)] * len(values))["w"]
    assert result[0] == -result[1]
    return result[0].item()


@pytest.mark.parametrize(
    ("name", "values", "result"),
    [
        ("mean", (1.0, 2.0, 3.0, 90.0), 24.0),
        ("median", (1.0, 2.0, 90.0), 2.0),
        ("median", (1.0, 2.0, 3.0, 90.0), 2.5),
        ("median", (7.0,), 7.0),
        ("median", (7.0, None, None), 0.0),
        ("trimmed", (1.0, 2.0, 90.0), 2.0),
        ("trimmed", (1.0, 2.0, 3.0, 90.0), 2.5),
        ("trimmed", (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 90.0), 4.5),
        ("trimmed", (1.0, 2.0), 1.5),
    ],
)
def test_a_combination_of_gradients(name, values, result):
    assert combined(name, *values) == result


def test_a_combination_without_effect_is_refused():
    with pytest.raises(ConfigError, match="policy.combine=median combines several gradients, and"):
        PolicySpec(kind="async", combine="median")
    with pytest.raises(ConfigError, match="with ReplicaUpdate each client trains a trunk of its"):
        ReplicaUpdate(RunSpec(policy=PolicySpec(combine="trimmed")))
