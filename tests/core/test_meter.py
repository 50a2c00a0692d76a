"""The events that a trunk makes of its calls, and a client of its requests."""

from collections import Counter
from typing import Any

import pytest

from fedsplit.client.metered import MeteredLink
from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.errors import NonFinite, Overloaded, StaleVersion
from fedsplit.link import LocalLink
from fedsplit.model import connect
from fedsplit.spec import PolicySpec
from fedsplit.telemetry.events import (
    ClientStepTaken,
    Contributed,
    Event,
    PassRun,
    RequestRetried,
    StepTaken,
    TokenArrived,
)
from fedsplit.telemetry.sinks import Sink, Telemetry
from fedsplit.trunk.call import Kind
from fedsplit.trunk.state import state_of
from tests.core.generating import prompt, scene
from tests.core.requests import ask, backward_of, contribute, forward_of, prepare
from tests.core.worlds import Clock, World, batch, small_run, world


class Kept(Sink):
    """Keeps all events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def metered(here: World) -> Kept:
    kept = Kept()
    here.service.engine.meter.telemetry = Telemetry(kept)
    return kept


def test_a_step_of_two_clients_is_reported_with_what_each_waited(tiny_llama) -> None:
    clock = Clock()
    with world(tiny_llama(), small_run(clients=2), clock) as here:
        kept = metered(here)
        first, _ = prepare(here, "a")
        second, _ = prepare(here, "b", seed=1)
        contribute(here, "a", first)
        clock.now += 3.0
        assert state_of(here.service).clients == 2
        assert state_of(here.service).idle_s == 3.0
        contribute(here, "b", second)
        (step,) = kept.of(StepTaken)
        assert (step.version, step.clients, step.waits_s) == (1, ("a", "b"), (3.0, 0.0))
        assert (step.num_tokens, step.taken, step.lr) == (44, 1, 0.1)
        assert step.gradient_norm > 0
        assert [each.outcome for each in kept.of(Contributed)] == ["used", "used"]
        passes = Counter(each.kind for each in kept.of(PassRun))
        assert passes == {"forward": 2, "backward": 2, "step": 2}
        assert {each.tokens for each in kept.of(PassRun)} == {24, 0}
        state = state_of(here.service)
        assert (state.version, state.sessions, state.idle_s, state.interval_s) == (1, 2, 0.0, 3.0)
        assert (state.stash.hits, state.stash.misses, state.stash.num_bytes) == (2, 0, 0)


def test_the_wait_for_the_barrier_is_no_wait_for_the_engine(tiny_llama) -> None:
    clock = Clock()
    with world(tiny_llama(), small_run(clients=2), clock) as here:
        kept = metered(here)
        first, _ = prepare(here, "a")
        second, _ = prepare(here, "b")
        contribute(here, "a", first)
        # It is held until the step.
        session = here.members["a"].trunk._named_session()
        held = here.service._sessions.of(session, "a").once
        future = held(Kind.FORWARD, forward_of(here.members["a"], 1), here.service.engine.submit)
        clock.now += 5.0
        contribute(here, "b", second)
        future.result(10)
        here.service.close()
        assert [each.queues_s for each in kept.of(PassRun) if each.kind == "forward"][-1] == (0.0,)


def test_what_is_refused_for_its_numbers_or_its_age_is_reported(tiny_llama) -> None:
    run = small_run(clients=2, policy=PolicySpec(kind="async", max_staleness=0))
    with world(tiny_llama(), run) as here:
        kept = metered(here)
        first, _ = prepare(here, "a")
        second, _ = prepare(here, "b")
        contribute(here, "a", first)
        with pytest.raises(StaleVersion):
            contribute(here, "b", second)
        forward = forward_of(here.members["a"], 1)
        ask(here, "a", forward)
        with pytest.raises(NonFinite):
            ask(here, "a", backward_of(forward, scale=float("nan")))
        outcomes = [(each.client, each.outcome) for each in kept.of(Contributed)]
        assert outcomes == [("a", "used"), ("b", "stale"), ("a", "refused")]
        assert state_of(here.service).refused == 1


def test_a_client_reports_its_steps_and_the_attempts_that_failed(tiny_llama) -> None:
    with world(tiny_llama(), small_run(clients=1)) as here:
        kept, model = Kept(), here.add("a").model
        link = Flaky(here)
        trunk = RemoteTrunk(MeteredLink(link, Telemetry(kept)), model, here.run, client="a")
        connect(model, trunk)
        trainer = ClientTrainer(model, trunk, here.run, telemetry=Telemetry(kept))
        stats = trainer.fit([[batch()], [batch(1)]])
        steps = kept.of(ClientStepTaken)
        assert [(each.client, each.samples, each.tokens) for each in steps] == [("a", 2, 22)] * 2
        assert sum(each.loss for each in steps) / 2 == pytest.approx(stats.loss)
        assert kept.of(RequestRetried) == [RequestRetried(code="OVERLOADED")]


class Flaky(LocalLink):
    """Refuses the first request of a client."""

    def __init__(self, here: World) -> None:
        super().__init__(here.service, here.service.admit("a"))
        self._is_up = False

    def exchange(self, request: Any) -> Any:
        if not self._is_up:
            self._is_up = True
            raise Overloaded("come back", retry_after_s=0.001)
        return super().exchange(request)


def test_the_first_token_and_those_after_it_are_reported() -> None:
    with scene("llama") as here:
        kept = Kept()
        here.service.engine.meter.telemetry = Telemetry(kept)
        link = LocalLink(here.service, here.service.admit("alice"))
        client = here.client(link=MeteredLink(link, Telemetry(kept)))
        client.says(prompt())
        tokens = kept.of(TokenArrived)
        assert [each.is_first for each in tokens] == [True] + [False] * 7
        assert all(each.seconds > 0 for each in tokens)
        # A pass is reported after its replies.
        here.service.engine.run(lambda: None).result()
        passes = kept.of(PassRun)
        assert {each.kind for each in passes} == {"generate"}
        assert [each.tokens for each in passes] == [12] + [1] * 7
        cache = state_of(here.service).kv_cache
        assert (cache.hits, cache.misses, cache.evictions) == (7, 0, 0) and cache.num_bytes
