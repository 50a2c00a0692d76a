"""The barrier: what it waits for, what it refuses, and that no schedule of events breaks it."""

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.spec import PolicySpec
from fedsplit.trunk.aggregator import (
    Barrier,
    Contributed,
    Event,
    Expected,
    Joined,
    Left,
    Refuse,
    Step,
    Ticked,
    Wait,
    advance,
    oldest,
)

DEADLINE_S = 10.0
SYNC = PolicySpec(kind="sync", deadline_s=DEADLINE_S)
ASYNC = PolicySpec(kind="async", deadline_s=DEADLINE_S, max_staleness=3)
QUORUM = PolicySpec(kind="quorum", deadline_s=DEADLINE_S, quorum=2, max_staleness=3)
STRICT = PolicySpec(kind="quorum", deadline_s=DEADLINE_S, quorum=0.5, late="refuse")
POLICIES = {"sync": SYNC, "async": ASYNC, "quorum": QUORUM, "strict quorum": STRICT}


def play(policy: PolicySpec, *events: tuple[float, Event], state: Barrier | None = None):
    """Take events in at their times; the last state and all decisions."""
    state, decisions = state or Barrier(), []
    for now, event in events:
        state, decision = advance(state, event, now=now, policy=policy)
        decisions.append(decision)
    return state, decisions


def gave(client: str, version: int = 0, num_tokens: int = 1) -> Contributed:
    return Contributed(client=client, version=version, num_tokens=num_tokens)


def joined(*clients: str) -> list[tuple[float, Event]]:
    return [(0.0, Joined(client=client)) for client in clients]


def expected(*clients: str, at_once: int = 99) -> tuple[float, Event]:
    return 0.0, Expected(clients=frozenset(clients), at_once=at_once)


def step(**weights: float) -> Step:
    return Step(weights=weights, scale=1.0)


# --- sync ------------------------------------------------------------------------------------


def test_steps_when_all_have_contributed_with_weights_by_tokens():
    state, decisions = play(
        SYNC, *joined("a", "b"), (1.0, gave("b", num_tokens=30)), (2.0, gave("a", num_tokens=10))
    )
    assert decisions[-2:] == [Wait(), step(a=0.25, b=0.75)]
    assert list(decisions[-1].weights) == ["a", "b"], "in the order of names, whoever was first"
    assert state == Barrier(version=1, present=frozenset("ab"))


def test_waits_for_the_clients_that_are_expected_before_the_first_step():
    state, decisions = play(
        SYNC,
        expected("a", "b"),
        (0.0, Joined(client="a")),
        (1.0, gave("a")),
        (2.0, Joined(client="b")),
        (3.0, gave("b")),
    )
    assert decisions[:4] == [Wait()] * 4
    assert decisions[4] == step(a=0.5, b=0.5)


def test_waits_for_as_many_as_work_at_once_and_for_the_next_when_one_has_left():
    state, decisions = play(
        SYNC,
        expected("a", "b", "c", at_once=2),
        *joined("a", "b"),
        (1.0, gave("a")),
        (1.0, gave("b")),
        (2.0, Left(client="a")),
        (3.0, gave("b", version=1)),
    )
    assert [type(d) for d in decisions[3:]] == [Wait, Step, Wait, Wait]
    state, decisions = play(
        SYNC, (4.0, Joined(client="c")), (5.0, gave("c", version=1)), state=state
    )
    assert decisions[-1] == step(b=0.5, c=0.5)


def test_nobody_waits_for_one_that_was_expected_and_is_released():
    _, decisions = play(
        SYNC, expected("a", "b"), *joined("a"), (1.0, gave("a")), (2.0, Left(client="b"))
    )
    assert decisions[-1] == step(a=1.0)


def test_to_expect_nobody_changes_nothing():
    before, _ = play(SYNC, expected("a", "b", "c", at_once=2), *joined("a"))
    after, _ = play(SYNC, expected(at_once=0), state=before)
    assert (before.num_awaited, after.num_awaited) == (2, 2)


def test_who_is_expected_later_adds_to_those_at_work():
    state, _ = play(QUORUM, *joined("late"), expected("a", "b", at_once=2))
    assert state.num_awaited == 3
    state, _ = play(QUORUM, *joined("a", "b"), state=state)
    assert state.num_awaited == 3


def test_one_that_was_expected_and_never_came_holds_up_until_the_deadline_only():
    state, decisions = play(
        SYNC,
        expected("a", "b"),
        (0.0, Joined(client="a")),
        (1.0, gave("a")),
        (10.9, Ticked()),
        (11.0, Ticked()),
    )
    assert decisions[3:] == [Wait(), step(a=1.0)]
    _, later = play(SYNC, (11.5, gave("a", version=1)), state=state)
    assert later == [step(a=1.0)], "it is not waited for again"


def test_the_deadline_runs_from_the_first_contribution():
    events = (1.0, gave("a")), (9.0, gave("b")), (11.0, Ticked())
    assert play(SYNC, *joined("a", "b", "c"), *events)[1][-1] == step(a=0.5, b=0.5)


def test_one_that_leaves_no_longer_holds_up():
    _, decisions = play(SYNC, *joined("a", "b"), (1.0, gave("a")), (2.0, Left(client="b")))
    assert decisions[-1] == step(a=1.0)


def test_what_one_contributed_before_it_left_counts():
    _, decisions = play(
        SYNC, *joined("a", "b"), (1.0, gave("a")), (2.0, Left(client="a")), (3.0, gave("b"))
    )
    assert decisions[-1] == step(a=0.5, b=0.5)


def test_the_late_is_refused_and_then_waited_for_again():
    state, decisions = play(
        SYNC, *joined("a", "b"), (0.0, gave("a")), (10.0, Ticked()), (11.0, gave("b"))
    )
    assert decisions[-2:] == [step(a=1.0), Refuse(current=1)]
    again = (12.0, Joined(client="b")), (13.0, gave("a", version=1))
    assert play(SYNC, *again, state=state)[1] == [Wait(), Wait()]


def test_a_barrier_nobody_contributed_to_has_no_deadline():
    state, decisions = play(SYNC, *joined("a", "b"), (1e9, Ticked()))
    assert decisions[-1] == Wait()
    assert state.deadline == math.inf


@pytest.mark.parametrize("policy", [SYNC, QUORUM], ids=["sync", "quorum"])
def test_a_client_counts_once_in_a_barrier(policy):
    state, decisions = play(policy, *joined("a", "b"), (1.0, gave("a")), (2.0, gave("a")))
    assert decisions[-1] == Refuse(current=0)
    assert state.contributors == {"a"}


def test_steps_without_an_awaited_client_are_counted_until_it_comes_or_leaves():
    state, _ = play(SYNC, expected("a", "b"), *joined("a"), (1.0, gave("a")), (11.0, Ticked()))
    assert (state.short, state.missing) == (1, {"b"})
    state, _ = play(SYNC, (12.0, gave("a", version=1)), state=state)
    assert state.short == 2, "its first step too, and those after it"
    came, _ = play(SYNC, (13.0, Joined(client="b")), state=state)
    both = (14.0, gave("a", version=2)), (15.0, gave("b", version=2))
    assert play(SYNC, *both, state=came)[0].short == 2
    left, _ = play(SYNC, (13.0, Left(client="b")), (14.0, gave("a", version=2)), state=state)
    assert left.short == 2, "its work has ended"


def test_a_client_without_room_is_not_awaited_yet():
    state, _ = play(
        SYNC,
        expected("a", "b", "c", at_once=2),
        *joined("a", "b"),
        (1.0, gave("a")),
        (11.0, Ticked()),
    )
    assert state.missing == {"b"}


# --- quorum ----------------------------------------------------------------------------------


def at_version(policy: PolicySpec, version: int, *clients: str) -> Barrier:
    """A barrier that is open, after others, with these clients at work."""
    return play(policy, *joined(*clients), state=Barrier(version=version))[0]


def test_a_quorum_steps_without_the_last_and_goes_on_counting_on_it():
    state, decisions = play(QUORUM, *joined("a", "b", "c"), (1.0, gave("a")), (2.0, gave("c")))
    assert decisions[-2:] == [Wait(), step(a=0.5, c=0.5)]
    assert state.present == {"a", "b", "c"}


def test_a_late_contribution_weighs_less_in_the_barrier_it_falls_into():
    state = at_version(QUORUM, 3, "a", "b", "c")
    _, decisions = play(
        QUORUM, (1.0, gave("a", 0, num_tokens=8)), (2.0, gave("b", 3, num_tokens=4)), state=state
    )
    assert decisions == [Wait(), step(a=0.5, b=0.5)], "8 tokens, 3 steps late: (3 + 1) ** -0.5"


@pytest.mark.parametrize(("policy", "version"), [(QUORUM, 4), (STRICT, 1)], ids=["old", "strict"])
def test_a_quorum_refuses_what_is_too_late(policy, version):
    state = at_version(policy, version, "a", "b")
    assert play(policy, (1.0, gave("a", 0)), state=state)[1] == [Refuse(current=version)]


def test_a_fraction_counts_those_who_are_about_to_join():
    state, decisions = play(STRICT, expected("a", "b", "c", "d"), *joined("a"), (1.0, gave("a")))
    assert decisions[-1] == Wait(), "2 of 4"
    assert play(STRICT, (1.0, gave("b")), state=state)[1] == [step(a=0.5, b=0.5)]


# --- async -----------------------------------------------------------------------------------


def test_every_contribution_is_a_step_whose_rate_falls_with_its_age():
    events = (1.0, gave("a", 0)), (1.0, gave("b", 0)), (1.0, gave("c", 0))
    _, decisions = play(ASYNC, expected("a", "b", "c"), *joined("a", "b", "c"), *events)
    assert [d.weights for d in decisions[-3:]] == [{"a": 1.0}, {"b": 1.0}, {"c": 1.0}]
    assert [d.scale for d in decisions[-3:]] == [1.0, 2**-0.5, 3**-0.5]


def test_async_refuses_what_is_too_old():
    state = Barrier(version=4)
    assert play(ASYNC, (1.0, gave("a", 1)), state=state)[1][0].scale == 0.5
    assert play(ASYNC, (1.0, gave("a", 0)), state=state)[1] == [Refuse(current=4)]


# --- any schedule ----------------------------------------------------------------------------


@dataclass
class World:
    """Clients that follow the rules, in an order and at times of hypothesis's choosing."""

    policy: PolicySpec
    state: Barrier = field(default_factory=Barrier)
    now: float = 0.0
    made: dict[str, int] = field(default_factory=dict)
    given: dict[str, int] = field(default_factory=dict)
    applied: list[tuple[str, int]] = field(default_factory=list)

    def tell(self, event: Event) -> bool:
        """Whether it was taken."""
        before = self.state.version
        self.state, decision = advance(self.state, event, now=self.now, policy=self.policy)
        if isinstance(event, Contributed) and not isinstance(decision, Refuse):
            self.given[event.client] = event.version
        if isinstance(decision, Step):
            assert self.state.version == before + 1
            assert math.isclose(sum(decision.weights.values()), 1.0)
            assert 0 < decision.scale <= 1
            assert decision.weights.keys() == self.given.keys(), "none is lost, none is invented"
            for client, version in self.given.items():
                assert before - version <= oldest(self.policy), "nothing too old is applied"
                self.applied.append((client, before))
            self.given.clear()
        else:
            assert self.state.version == before
        return not isinstance(decision, Refuse)

    def act(self, client: str, action: str, seconds: float) -> None:
        self.now += seconds
        match action:
            case "expect":
                clients = frozenset({client, "a"})
                self.tell(Expected(clients=clients, at_once=1 + len(client) % 2))
            case "join":
                self.tell(Joined(client=client))
            case "forward" if client not in self.given:
                self.made.setdefault(client, self.state.version)
            case "give" if client in self.made:
                version = self.made.pop(client)
                age, is_second = self.state.version - version, client in self.given
                taken = self.tell(gave(client, version, num_tokens=len(client)))
                assert taken == (age <= oldest(self.policy) and not is_second)
            case "die" | "release":
                self.made.pop(client, None)
                self.tell(Left(client=client))
            case "tick":
                self.tell(Ticked())


ACTIONS = ["expect", "join", "forward", "forward", "give", "give", "die", "release", "tick"]
SCHEDULE = st.lists(
    st.tuples(
        st.sampled_from(["a", "bb", "ccc", "dddd"]), st.sampled_from(ACTIONS), st.floats(0.0, 6.0)
    ),
    max_size=60,
)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
@settings(max_examples=500)
@given(SCHEDULE)
def test_no_schedule_loses_or_repeats_a_contribution_or_waits_beyond_the_deadline(policy, schedule):
    world = World(policy)
    for client, action, seconds in schedule:
        world.act(client, action, seconds)
        assert world.state.contributors == world.given.keys()
        if world.given:
            assert world.state.deadline <= world.now + DEADLINE_S
            assert policy.kind != "async", "it waits for nobody"
    assert len(world.applied) == len(set(world.applied)), "nothing is applied twice"
    if world.given:
        world.now += DEADLINE_S
        world.tell(Ticked())
    assert not world.given, "the deadline ends every wait"


@pytest.mark.parametrize("num_clients", [1, 2, 20])
def test_any_number_of_clients_in_step(num_clients):
    names = [f"c{i}" for i in range(num_clients)]
    state, _ = play(SYNC, *joined(*names))
    for version in range(3):
        events = ((1.0, gave(name, version)) for name in names)
        state, decisions = play(SYNC, *events, state=state)
        assert [type(d) for d in decisions] == [Wait] * (num_clients - 1) + [Step]
