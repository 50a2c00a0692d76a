"""The barrier: what it waits for, what it refuses, and that no schedule of events breaks it."""

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.trunk.aggregator import (
    Barrier,
    Contributed,
    Event,
    Joined,
    Left,
    Refuse,
    RoundOpened,
    Step,
    Ticked,
    Wait,
    sync,
)

DEADLINE_S = 10.0


def play(*events: tuple[float, Event], state: Barrier | None = None):
    """Take events in at their times; the last state and all decisions."""
    state, decisions = state or Barrier(), []
    for now, event in events:
        state, decision = sync(state, event, now=now, deadline_s=DEADLINE_S)
        decisions.append(decision)
    return state, decisions


def gave(client: str, version: int = 0, num_tokens: int = 1) -> Contributed:
    return Contributed(client=client, version=version, num_tokens=num_tokens)


def joined(*clients: str) -> list[tuple[float, Event]]:
    return [(0.0, Joined(client=client)) for client in clients]


def test_steps_when_all_have_contributed_with_weights_by_tokens():
    state, decisions = play(
        *joined("a", "b"), (1.0, gave("b", num_tokens=30)), (2.0, gave("a", num_tokens=10))
    )
    assert decisions[-2:] == [Wait(), Step(weights={"a": 0.25, "b": 0.75})]
    assert list(decisions[-1].weights) == ["a", "b"], "in the order of names, whoever was first"
    assert state == Barrier(version=1, awaited=frozenset("ab"))


def test_waits_for_the_clients_that_are_expected_before_the_first_step():
    state, decisions = play(
        (0.0, RoundOpened(expected=2)),
        (0.0, Joined(client="a")),
        (1.0, gave("a")),
        (2.0, Joined(client="b")),
        (3.0, gave("b")),
    )
    assert decisions[:4] == [Wait()] * 4
    assert decisions[4] == Step(weights={"a": 0.5, "b": 0.5})


def test_one_that_was_expected_and_never_came_holds_up_until_the_deadline_only():
    state, decisions = play(
        (0.0, RoundOpened(expected=2)),
        (0.0, Joined(client="a")),
        (1.0, gave("a")),
        (10.9, Ticked()),
        (11.0, Ticked()),
    )
    assert decisions[3:] == [Wait(), Step(weights={"a": 1.0})]
    _, later = play((11.5, gave("a", version=1)), state=state)
    assert later == [Step(weights={"a": 1.0})], "it is not waited for again"


def test_one_that_leaves_no_longer_holds_up():
    _, decisions = play(*joined("a", "b"), (1.0, gave("a")), (2.0, Left(client="b")))
    assert decisions[-1] == Step(weights={"a": 1.0})


def test_what_one_contributed_before_it_left_counts():
    _, decisions = play(
        *joined("a", "b"), (1.0, gave("a")), (2.0, Left(client="a")), (3.0, gave("b"))
    )
    assert decisions[-1] == Step(weights={"a": 0.5, "b": 0.5})


def test_the_late_is_refused_and_then_waited_for_again():
    state, decisions = play(
        *joined("a", "b"), (0.0, gave("a")), (10.0, Ticked()), (11.0, gave("b"))
    )
    assert decisions[-2:] == [Step(weights={"a": 1.0}), Refuse(current=1)]
    state, decisions = play((12.0, Joined(client="b")), (13.0, gave("a", version=1)), state=state)
    assert decisions == [Wait(), Wait()]


def test_a_barrier_nobody_contributed_to_has_no_deadline():
    state, decisions = play(*joined("a", "b"), (1e9, Ticked()))
    assert decisions[-1] == Wait()
    assert state.deadline == math.inf


def test_a_client_counts_once_in_a_barrier():
    state, decisions = play(*joined("a", "b"), (1.0, gave("a")), (2.0, gave("a")))
    assert decisions[-1] == Refuse(current=0)
    assert state.tokens == (("a", 1),)


@dataclass
class World:
    """Clients that follow the rules, in an order and at times of hypothesis's choosing."""

    state: Barrier = field(default_factory=Barrier)
    now: float = 0.0
    given: dict[str, int] = field(default_factory=dict)
    alive: set[str] = field(default_factory=set)
    applied: list[tuple[int, str]] = field(default_factory=list)

    def tell(self, event: Event) -> None:
        before = self.state.version
        self.state, decision = sync(self.state, event, now=self.now, deadline_s=DEADLINE_S)
        if isinstance(decision, Step):
            assert self.state.version == before + 1
            assert math.isclose(sum(decision.weights.values()), 1.0)
            for client in decision.weights:
                assert self.given.pop(client) == before, "nothing stale is applied"
                self.applied.append((before, client))
            assert not self.given, "no contribution is lost"
        else:
            assert self.state.version == before

    def act(self, client: str, action: str, seconds: float) -> None:
        self.now += seconds
        if action == "join":
            self.alive.add(client)
            self.tell(Joined(client=client))
        elif action == "leave":
            self.alive.discard(client)
            self.tell(Left(client=client))
        elif action == "give" and client in self.alive and client not in self.given:
            self.given[client] = self.state.version
            self.tell(gave(client, self.state.version, num_tokens=len(client) + 1))
        elif action == "open":
            self.tell(RoundOpened(expected=2))
        elif action == "tick":
            self.tell(Ticked())


ACTIONS = st.tuples(
    st.sampled_from(["a", "bb", "ccc", "dddd"]),
    st.sampled_from(["join", "leave", "give", "give", "give", "open", "tick"]),
    st.floats(0.0, 6.0),
)


@given(st.lists(ACTIONS, max_size=60))
def test_no_schedule_loses_or_repeats_a_contribution_or_waits_beyond_the_deadline(schedule):
    world = World()
    for client, action, seconds in schedule:
        world.act(client, action, seconds)
        if world.given and world.now < world.state.deadline:
            assert world.state.deadline <= world.now + DEADLINE_S
    assert len(world.applied) == len(set(world.applied)), "nothing is applied twice"
    if world.given:
        world.now += DEADLINE_S
        world.tell(Ticked())
    assert not world.given, "the deadline ends every wait"


@pytest.mark.parametrize("num_clients", [1, 2, 20])
def test_any_number_of_clients_in_step(num_clients):
    names = [f"c{i}" for i in range(num_clients)]
    state, _ = play(*joined(*names))
    for version in range(3):
        state, decisions = play(*((1.0, gave(name, version)) for name in names), state=state)
        assert [type(d) for d in decisions] == [Wait] * (num_clients - 1) + [Step]
