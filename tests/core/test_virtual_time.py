"""The clocks: whose turn it is never depends on who asked first, and nobody waits for ever."""

import math
import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.spec import PolicySpec
from fedsplit.trunk.aggregator import (
    Barrier,
    Contributed,
    Expected,
    Joined,
    Left,
    Refuse,
    Ticked,
    advance,
)
from fedsplit.trunk.call import Call, Kind
from fedsplit.trunk.scheduler import Scheduler
from fedsplit.trunk.virtual_time import VirtualTimeScheduler

NEVER = math.inf


KIND = {"forward": Kind.FORWARD, "step": Kind.STEP, "leave": Kind.LEAVE}


def call(client: str, kind: Kind, session: str = "s") -> Call:
    return Call(client=client, session=session, kind=kind)


def virtual_time(slowdown: dict[str, float], excluded=frozenset()) -> VirtualTimeScheduler:
    return VirtualTimeScheduler(slowdown, 100.0, 0.0, lambda: 0.0, excluded.__contains__)


def turns(time, deadline=NEVER, waiting=()):
    """All that may run now, as (time, client, kind)."""
    found = []
    while turn := time.next_call(deadline, waiting):
        assert turn.kind is not Kind.TICK
        found.append((time.now, turn.client, turn.kind.value[1]))
    return found


def virtual(*clients: str, close_after=99, until=NEVER, **slowdown: float) -> VirtualTimeScheduler:
    time = virtual_time(slowdown)
    time.expect(clients, close_after=close_after, until=until)
    return time


def ask(time, *requests: tuple[str, str]) -> None:
    for client, kind in requests:
        time.admit(call(client, KIND[kind]))


# --- the virtual clock, by example -----------------------------------------------------------


def test_nobody_runs_ahead_of_one_who_is_expected():
    time = virtual("a", "b")
    ask(time, ("b", "forward"))
    assert turns(time) == [], "a may yet come, and would be first"
    ask(time, ("a", "forward"))
    assert turns(time) == [(0.0, "a", "forward"), (0.0, "b", "forward")]


def test_a_slow_machine_steps_later_whoever_asks_first():
    time = virtual("fast", "slow", slow=2.5)
    ask(time, ("slow", "forward"), ("fast", "forward"), ("slow", "step"))
    assert [client for _, client, _ in turns(time)] == ["fast", "slow"]
    ask(time, ("fast", "step"), ("fast", "forward"))
    assert turns(time) == [(1.0, "fast", "step"), (1.0, "fast", "forward")]
    ask(time, ("fast", "step"))
    assert turns(time) == [(2.0, "fast", "step")]
    ask(time, ("fast", "leave"))
    assert turns(time) == [(2.0, "fast", "leave"), (2.5, "slow", "step")]


def test_further_forwards_of_a_step_run_at_once():
    time = virtual("a", "b")
    ask(time, ("a", "forward"), ("a", "forward"), ("b", "forward"))
    assert len(turns(time)) == 3
    ask(time, ("b", "forward"))
    assert turns(time) == [(0.0, "b", "forward")]


def test_who_waits_at_a_barrier_goes_on_when_it_closes():
    time = virtual("a", "b", b=10.0)
    ask(time, ("a", "forward"), ("b", "forward"))
    turns(time)
    ask(time, ("a", "step"), ("a", "forward"), ("b", "step"))
    assert turns(time, waiting={"a"}) == [(1.0, "a", "step"), (10.0, "b", "step")]
    ask(time, ("b", "leave"))
    assert turns(time) == [(10.0, "a", "forward"), (10.0, "b", "leave")]


def test_a_deadline_has_its_turn_after_all_events_until_then():
    time = virtual("a", "b", b=10.0)
    ask(time, ("a", "forward"), ("b", "forward"))
    turns(time)
    ask(time, ("a", "step"))
    assert time.next_call(1.0, ()).kind is Kind.STEP
    assert time.next_call(4.0, ()) is None, "a may step at 2 again"
    ask(time, ("a", "forward"))
    assert time.next_call(4.0, {"a"}).kind is Kind.TICK
    assert time.now == 4.0


def test_time_stands_still_after_departures_and_at_its_end():
    time = virtual("a", "b", close_after=1, until=1.5)
    ask(time, ("a", "leave"), ("b", "forward"))
    assert turns(time) == [(0.0, "a", "leave")]
    time.expect([], close_after=1, until=1.5)
    assert turns(time) == [(0.0, "b", "forward")]
    ask(time, ("b", "step"), ("b", "forward"))
    assert turns(time) == [(1.0, "b", "step"), (1.0, "b", "forward")]
    ask(time, ("b", "step"))
    assert (turns(time), time.now) == ([], 1.5)
    time.pause()
    time.expect(["a"], close_after=1, until=NEVER)
    ask(time, ("a", "forward"))
    assert turns(time) == [(1.5, "a", "forward"), (2.0, "b", "step")]
    ask(time, ("b", "leave"))
    turns(time)
    ask(time, ("a", "step"))
    assert turns(time) == [(2.5, "a", "step")], "b is of the round before and counts no more"


def test_before_anybody_is_expected_nothing_moves_but_what_is_no_event():
    time = virtual_time({})
    ask(time, ("a", "forward"), ("b", "leave"))
    assert turns(time) == [(0.0, "b", "leave")], "b is not here"


def test_who_comes_back_before_its_turn_to_leave_has_not_left():
    time = virtual("a", "b", close_after=1)
    ask(time, ("b", "leave"))
    assert [each.kind for each in time.join("b")] == [Kind.LEAVE]
    ask(time, ("a", "forward"), ("b", "forward"))
    assert len(turns(time)) == 2


def test_one_that_is_released_and_goes_on_all_the_same_is_taken_in_again():
    time = virtual("a", "b", b=3.0)
    ask(time, ("a", "forward"), ("b", "forward"))
    turns(time)
    ask(time, ("b", "step"), ("b", "leave"), ("a", "leave"))
    assert turns(time) == [(1.0, "a", "leave"), (3.0, "b", "leave"), (3.0, "b", "step")]


def test_what_a_session_asked_for_can_be_withdrawn():
    time = virtual("a", "b")
    ask(time, ("b", "forward"))
    time.admit(call("b", Kind.STEP, session="other"))
    assert [each.session for each in time.withdraw("s")] == ["s"]
    assert [each.session for each in time._ordered()] == ["other"]


def test_one_that_holds_up_time_can_be_given_up():
    time = virtual("a", "b")
    ask(time, ("b", "forward"))
    assert time.give_up(()) == "a"
    assert time.give_up(()) is None, "b has asked"
    assert turns(time) == [(0.0, "b", "forward")]


def test_an_excluded_client_holds_back_no_other_and_its_calls_run_at_once():
    excluded: set[str] = set()
    time = virtual_time({"m": 3.0}, excluded)
    time.expect(["a", "m"], close_after=1, until=NEVER)
    ask(time, ("a", "forward"), ("m", "forward"), ("a", "step"), ("a", "forward"))
    assert [client for _, client, _ in turns(time)] == ["a", "m", "a", "a"]
    ask(time, ("a", "step"), ("a", "forward"), ("a", "step"), ("a", "forward"), ("m", "leave"))
    excluded.add("m")
    assert turns(time)[0] == (1.0, "m", "leave")
    ask(time, ("m", "forward"), ("m", "step"), ("a", "step"))
    assert turns(time) == [
        (3.0, "m", "forward"),
        (3.0, "m", "step"),
        (4.0, "a", "step"),
    ], "without it, time would stand still after one has left"
    time.expect(["m"], close_after=1, until=NEVER)
    ask(time, ("a", "forward"), ("a", "step"))
    assert turns(time)[-1] == (5.0, "a", "step")


# --- the real clock --------------------------------------------------------------------------


def test_on_the_real_clock_requests_run_as_they_come_but_for_a_barrier():
    clock = iter([0.0] * 9)
    time = Scheduler(0.0, lambda: next(clock))
    ask(time, ("b", "forward"), ("a", "step"), ("a", "forward"), ("c", "leave"))
    assert [client for _, client, _ in turns(Scheduler(0.0, lambda: 0.0))] == []
    assert time.next_call(NEVER, {"b"}).client == "a"
    assert [time.next_call(NEVER, {"b"}).kind for _ in range(2)] == [Kind.FORWARD, Kind.LEAVE]
    assert time.next_call(NEVER, {"b"}) is None
    assert time.next_call(0.0, {"b"}).kind is Kind.TICK
    assert time.next_call(NEVER, ()).client == "b"


# --- any schedule ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What one client will do in a round: so many steps; if it `dies`, in the middle of one."""

    steps: int
    dies: bool

    def requests(self) -> list[Kind]:
        end = [Kind.FORWARD] if self.dies else []
        return [Kind.FORWARD, Kind.STEP] * self.steps + end + [Kind.LEAVE]


@dataclass
class Federation:
    """Clients that ask in an order of chance, a barrier, and someone who sends them out again."""

    policy: PolicySpec
    plans: list[dict[str, Plan]]
    close_after: int
    seed: int
    log: list[tuple[float, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.time = virtual_time(self.policy.sim_slowdown)
        self.barrier = Barrier()
        self.to_ask: dict[str, deque[Kind]] = {}
        self.silent: set[str] = set()
        self.made: dict[str, int] = {}

    def run(self) -> list[tuple[float, str, str]]:
        for number, plans in enumerate(self.plans):
            idle = [name for name in plans if name not in self.to_ask]
            self.send_out({name: plans[name] for name in idle})
            is_last = number == len(self.plans) - 1
            close_after = 99 if is_last else min(self.close_after, max(1, len(idle)))
            self.time.expect(idle, close_after=close_after, until=NEVER)
            event = Expected(clients=frozenset(idle), at_once=len(idle))
            self.tell(event)
            self.play()
            self.time.pause()
        assert not self.to_ask, "everybody came to the end"
        assert not self.time.num_waiting
        assert not self.barrier.contributions, "and what was contributed was applied"
        return self.log

    def send_out(self, plans: dict[str, Plan]) -> None:
        for name, plan in plans.items():
            self.to_ask[name] = deque(plan.requests())
            self.silent.add(name)

    def play(self) -> None:
        """Until nothing moves any more, whatever arrives."""
        while self.silent or self.take_turns():
            if self.silent:
                name = self.chance.choice(sorted(self.silent))
                self.silent.remove(name)
                if self.chance.random() < 0.3:
                    self.time.join(name)
                self.time.admit(call(name, self.to_ask[name][0]))
                if self.chance.random() < 0.5:
                    self.take_turns()

    def take_turns(self) -> bool:
        count = len(self.log)
        while turn := self.time.next_call(self.barrier.deadline, self.barrier.contributors):
            self.take(turn)
        return len(self.log) > count

    def take(self, turn: Call) -> None:
        if turn.kind is Kind.TICK:
            self.log.append((self.time.now, "", "deadline"))
            self.tell(Ticked())
            return
        name = turn.client
        self.log.append((self.time.now, name, turn.kind.value[1]))
        todo = self.to_ask[name]
        todo.popleft()
        if turn.kind is Kind.FORWARD:
            assert name not in self.barrier.contributors
            self.made[name] = self.barrier.version
        elif turn.kind is Kind.STEP:
            event = Contributed(client=name, version=self.made.pop(name), num_tokens=1)
            if isinstance(self.tell(event), Refuse):
                self.time.join(name)
                self.tell(Joined(client=name))
                todo.extendleft([Kind.STEP, Kind.FORWARD])
        else:
            self.tell(Left(client=name))
            del self.to_ask[name]
            return
        self.silent.add(name)

    def tell(self, event):
        self.barrier, decision = advance(self.barrier, event, now=self.time.now, policy=self.policy)
        return decision


NAMES = ["a", "b", "c", "d"]
PLANS = st.builds(Plan, steps=st.integers(0, 3), dies=st.booleans())
ROUNDS = st.lists(
    st.dictionaries(st.sampled_from(NAMES), PLANS, min_size=1), min_size=1, max_size=3
)
SLOWDOWN = st.dictionaries(st.sampled_from(NAMES), st.sampled_from([1.0, 2.0, 2.5, 7.0]))
KINDS = {
    "sync": dict(kind="sync", deadline_s=5.0),
    "async": dict(kind="async", max_staleness=2),
    "quorum": dict(kind="quorum", quorum=2, deadline_s=5.0, max_staleness=3),
    "strict quorum": dict(kind="quorum", quorum=0.6, deadline_s=3.0, late="refuse"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
@settings(max_examples=150)
@given(ROUNDS, SLOWDOWN, st.integers(1, 4), st.integers(0, 2**16))
def test_events_come_in_the_order_of_time_whoever_asks_first_and_all_come_to_an_end(
    kind, rounds, slowdown, close_after, seed
):
    policy = PolicySpec(sim_slowdown=slowdown, **kind)
    log = Federation(policy, rounds, close_after, seed).run()
    times = [time for time, _, _ in log]
    assert times == sorted(times)
    again = Federation(policy, rounds, close_after, seed + 1).run()
    assert again == log
    if policy.kind == "async" and len(rounds) == 1:
        assert log == sorted(log, key=lambda event: event[:2])


def test_a_slow_client_takes_its_time_and_the_others_theirs():
    policy = PolicySpec(kind="async", sim_slowdown={"d": 10.0})
    plans = {name: Plan(steps=20 if name != "d" else 2, dies=False) for name in NAMES}
    log = Federation(policy, [plans], 99, 0).run()
    ends = {client: time for time, client, kind in log if kind == "leave"}
    assert ends == {"a": 20.0, "b": 20.0, "c": 20.0, "d": 20.0}
