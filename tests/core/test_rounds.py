"""The rounds of each policy: by hand, and through thousands of random schedules."""

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.flower.strategy.round_policy import (
    Decision,
    Drain,
    Event,
    Failed,
    Opened,
    Replied,
    RoundState,
    Ticked,
    Work,
    advance,
)
from fedsplit.spec import PolicySpec

SYNC = PolicySpec(kind="sync")
QUORUM = PolicySpec(kind="quorum", quorum=2, max_staleness=2)
ASYNC = PolicySpec(kind="async", max_staleness=4)
BUFFERED = PolicySpec(kind="async", buffer=3, discount="hinge", discount_b=1, max_staleness=3)
NAMES = ("a", "b", "c", "d", "e")


@dataclass
class Play:
    """A run of rounds that checks, after each event, what must always hold."""

    policy: PolicySpec
    state: RoundState = field(default_factory=RoundState)
    now: float = 0.0
    replied: set[int] = field(default_factory=set)
    settled: set[int] = field(default_factory=set)
    last: Decision = field(default_factory=Decision)

    def tell(self, event: Event) -> Decision:
        before = self.state
        self.state, self.last = advance(before, event, now=self.now, policy=self.policy)
        self.check(before, self.last)
        return self.last

    def open(
        self,
        *clients: str,
        drain: Drain = Drain.NONE,
        seconds: float = 100.0,
        number: int | None = None,
    ) -> dict[str, int]:
        round = self.state.round + 1 if number is None else number
        deadline = self.now + seconds
        sent = self.tell(Opened(round=round, clients=clients, deadline=deadline, drain=drain)).send
        return {work.client: work.number for work in sent}

    def reply(self, client: str, tokens: int = 10, again: bool = True) -> Decision:
        number = self.number_of(client)
        if tokens:
            self.replied.add(number)
        return self.tell(Replied(number=number, num_tokens=tokens, again=again))

    def fail(self, client: str) -> Decision:
        return self.tell(Failed(number=self.number_of(client)))

    def wait(self, seconds: float) -> Decision:
        self.now += seconds
        return self.tell(Ticked())

    def number_of(self, client: str) -> int:
        return next(work.number for work in self.state.busy if work.client == client)

    def check(self, before: RoundState, decision: Decision) -> None:
        after = self.state
        assert after.round >= before.round
        assert after.version == before.version + bool(decision.merge)
        assert after.is_open or decision.closed or not before.is_open
        names = [work.client for work in after.busy]
        assert len(names) == len(set(names)), "a client is at one thing at a time"
        assert {work.number for work in decision.send} <= {work.number for work in after.busy}
        assert all(work.version == after.version for work in decision.send)
        if decision.merge:
            assert sum(share.weight for share in decision.merge) == pytest.approx(1.0)
        for share in decision.merge:
            staleness = before.version - share.work.version
            most = 0 if self.policy.kind == "sync" else self.policy.max_staleness
            assert 0 <= staleness <= most
            assert share.discount == self.policy.discount_of(staleness)
        merged = [share.work.number for share in decision.merge]
        dropped = [work.number for work in decision.dropped if work.number in self.replied]
        for number in merged + dropped:
            assert number in self.replied - self.settled, "merged or dropped, and once"
            self.settled.add(number)
        waiting = {work.number for work, _ in after.arrived}
        assert waiting == self.replied - self.settled, "nothing is lost"


def weights(decision: Decision) -> dict[str, float]:
    return {share.work.client: share.weight for share in decision.merge}


# --- sync -----------------------------------------------------------------------------------


def test_sync_waits_for_all_and_weighs_by_tokens() -> None:
    play = Play(SYNC)
    play.open("a", "b", "c")
    assert play.reply("c", 30) == play.reply("a", 10) == Decision()
    decision = play.reply("b", 20)
    assert decision.closed
    assert weights(decision) == pytest.approx({"a": 1 / 6, "b": 1 / 3, "c": 1 / 2})
    assert [share.work.client for share in decision.merge] == ["a", "b", "c"]


def test_sync_goes_on_without_who_fails() -> None:
    play = Play(SYNC)
    play.open("a", "b")
    assert not play.fail("a").closed
    assert weights(play.reply("b")) == {"b": 1.0}


def test_sync_gives_up_at_its_deadline_and_drops_what_comes_later() -> None:
    play = Play(SYNC)
    play.open("a", "b", seconds=5)
    play.reply("a")
    assert not play.wait(4.9).closed
    decision = play.wait(0.1)
    assert (decision.closed, weights(decision)) == (True, {"a": 1.0})
    assert [work.client for work in play.state.awaited] == ["b"]
    play.open("a", drain=Drain.ALL)
    (late,) = play.reply("b").dropped
    assert (late.client, late.round) == ("b", 1)
    assert play.reply("a").closed


def test_nobody_replies_before_the_deadline() -> None:
    play = Play(SYNC)
    play.open("a", seconds=5)
    assert play.wait(5) == Decision(closed=True)


# --- quorum ---------------------------------------------------------------------------------


def test_a_quorum_closes_the_round_and_the_late_one_counts_less_in_the_next() -> None:
    play = Play(QUORUM)
    play.open("a", "b", "c")
    play.reply("a")
    assert weights(play.reply("b")) == {"a": 0.5, "b": 0.5}
    play.open("a", "b")
    assert not play.reply("c").closed, "a late one is not one of the quorum"
    play.reply("a")
    decision = play.reply("b")
    discount = PolicySpec().discount_of(1)
    share = discount / (2 + discount)
    assert weights(decision)["c"] == pytest.approx(share)
    assert {s.work.client: s.discount for s in decision.merge} == {"a": 1, "b": 1, "c": discount}


def test_what_is_too_late_for_a_quorum_is_dropped() -> None:
    play = Play(QUORUM)
    play.open("a", "b", "c")
    for _ in range(3):
        play.reply("a")
        assert play.reply("b").closed
        play.open("a", "b")
    assert [work.client for work in play.reply("c").dropped] == ["c"]


def test_a_quorum_that_can_no_longer_be_reached_is_not_waited_for() -> None:
    play = Play(QUORUM)
    play.open("a", "b", "c")
    play.fail("a")
    play.fail("b")
    assert weights(play.reply("c")) == {"c": 1.0}


def test_a_round_that_is_kept_waits_for_the_late_ones_too() -> None:
    play = Play(QUORUM)
    play.open("a", "b", "c", drain=Drain.ALL)
    play.reply("a")
    assert not play.reply("b").closed
    assert set(weights(play.reply("c"))) == {"a", "b", "c"}
    assert play.state.busy == play.state.arrived == ()


# --- async ----------------------------------------------------------------------------------


def test_async_merges_each_reply_and_sends_its_client_out_again() -> None:
    play = Play(ASYNC)
    play.open("a", "b", "c")
    decision = play.reply("b")
    assert weights(decision) == {"b": 1.0}
    again = Work(number=4, client="b", round=1, version=1)
    assert (decision.send, decision.closed) == ((again,), False)
    decision = play.reply("a")
    assert [share.discount for share in decision.merge] == [PolicySpec().discount_of(1)]
    assert play.reply("b", again=False).closed, "as many replies as there were clients"
    assert [work.client for work in play.state.busy] == ["c", "a"]


def test_an_evaluated_async_round_waits_for_those_that_were_back_before() -> None:
    play = Play(ASYNC)
    play.open("slow", "a", "b", drain=Drain.RETURNED)
    play.reply("a")
    play.reply("b")
    assert not play.reply("a").closed, "b is out again"
    decision = play.reply("b")
    assert (decision.closed, decision.send) == (True, ())
    assert [work.client for work in play.state.busy] == ["slow"]
    play.open("a", "b", drain=Drain.ALL)
    assert play.state.wanted == 3
    play.reply("a"), play.reply("b"), play.reply("a"), play.reply("b")
    assert play.reply("slow").closed
    assert play.state.busy == ()


def test_an_evaluated_async_round_does_not_wait_for_a_slow_one_that_was_just_back() -> None:
    play = Play(ASYNC)
    play.open("slow", "a", "b")
    for play.now, client in ((4.0, "a"), (4.0, "b"), (8.0, "a")):
        play.reply(client)
    assert not play.state.is_open
    play.open("a", drain=Drain.RETURNED)
    for play.now, client in ((8.5, "b"), (10.0, "slow"), (12.0, "a")):
        assert not play.reply(client).closed
    play.now = 13.0
    assert play.reply("b").closed, "b took 4.5 s and was waited for"
    assert [work.client for work in play.state.busy] == ["slow"], "it takes 10 s"


def test_a_buffer_is_merged_when_it_is_full_and_emptied_before_a_checkpoint() -> None:
    play = Play(BUFFERED)
    play.open("a", "b")
    play.reply("a", again=False)
    assert play.reply("b").closed
    assert play.state.version == 0
    play.open("a", "b", drain=Drain.ALL)
    assert [share.weight for share in play.reply("a").merge] == pytest.approx([1 / 3] * 3)
    assert play.state.version == 1
    play.reply("a"), play.reply("b")
    assert play.last.closed
    assert play.state.arrived == ()


def test_a_client_that_fails_is_not_sent_out_again_in_the_round() -> None:
    play = Play(ASYNC)
    play.open("a", "b")
    assert play.fail("a").send == ()
    play.reply("b")
    assert play.reply("b").closed


def test_a_client_without_tokens_has_nothing_to_merge() -> None:
    play = Play(SYNC)
    play.open("a", "b")
    assert [work.client for work in play.reply("a", tokens=0).dropped] == ["a"]
    assert weights(play.reply("b")) == {"b": 1.0}


def test_replies_without_tokens_do_not_end_a_round_for_the_others() -> None:
    play = Play(ASYNC)
    play.open("a", "b", "idle")
    assert play.reply("idle", tokens=0).send == (), "or it would reply at once, again and again"
    play.reply("a"), play.reply("b")
    assert play.state.is_open and play.state.num_replies == 2
    assert play.reply("a").closed
    play = Play(QUORUM)
    play.open("a", "b", "idle")
    play.reply("idle", tokens=0)
    assert not play.reply("a").closed
    assert weights(play.reply("b")) == pytest.approx({"a": 0.5, "b": 0.5})


@pytest.mark.parametrize("number", [0, 2], ids=["an earlier round", "while one is open"])
def test_a_round_cannot_be_opened_out_of_turn(number: int) -> None:
    play = Play(SYNC)
    play.open("a")
    if number == 0:
        play.reply("a")
    with pytest.raises(ValueError, match=f"round {number} cannot open"):
        play.open("a", number=number)


# --- any schedule -----------------------------------------------------------------------------

moves = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), max_size=40)
policies = st.sampled_from([SYNC, QUORUM, ASYNC, BUFFERED, PolicySpec(kind="quorum", quorum=0.5)])


@settings(max_examples=1000, deadline=None)
@given(policy=policies, moves=moves)
def test_any_schedule(policy: PolicySpec, moves: list[tuple[int, int]]) -> None:
    play = Play(policy)
    drains = list(Drain)
    for kind, choice in moves:
        busy = sorted(work.client for work in play.state.busy)
        idle = [name for name in NAMES if name not in busy]
        if not play.state.is_open:
            chosen = idle[: 1 + choice % len(idle)] if idle else []
            if chosen:
                play.open(*chosen, drain=drains[choice % 3], seconds=5 + choice % 7)
            elif busy:  # between rounds, who is late may come back
                play.reply(busy[choice % len(busy)])
        elif kind < 6 and busy:
            play.reply(busy[choice % len(busy)], tokens=choice, again=choice % 5 > 0)
        elif kind < 8 and busy:
            play.fail(busy[choice % len(busy)])
        else:
            play.wait(choice / 20)
    finish(play)


def finish(play: Play) -> None:
    """Whatever has happened, a round ends: when all are back, and when its time is over."""
    if not play.state.is_open:
        play.open(*[n for n in NAMES if n not in {work.client for work in play.state.busy}])
    if play.state.round % 2:
        play.wait(1000.0)
    for _ in range(100):
        if not (play.state.is_open and play.state.busy):
            break
        play.reply(play.state.busy[0].client)
    assert play.wait(0.0).closed or not play.state.is_open
    if play.state.drain is Drain.ALL and play.now < 1000 and play.policy.kind != "sync":
        assert play.state.busy == play.state.arrived == ()
    assert math.isinf(play.state.deadline)
