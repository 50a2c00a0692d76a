"""Clients in other processes that are killed, frozen or restarted in the middle of a step."""

import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import psutil
import pytest

from fedsplit.client.stats import FitStats
from fedsplit.transport.client import GrpcLink
from fedsplit.transport.server import GrpcServer
from tests.core.worlds import World, batch, wait_until, world
from tests.edge.forked import Program
from tests.edge.gone_client import CONFIG, NAME, STEPS, run_of

OTHERS = "client-1", "client-2"
POINTS = {
    "opened": ("OpenRequest", 1),
    "forward": ("ForwardRequest", 2),
    "backward": ("BackwardRequest", 2),
    "contributed": ("StepRequest", 2),
}
"""The requests after whose reply a client stops; the last three are of its second step."""


@dataclass
class Federation:
    """A served trunk with two clients in this process, and a third one in another."""

    here: World
    policy: str
    deadline_s: float
    address: str
    token: str
    pool: ThreadPoolExecutor
    unused: dict[str, str]

    def third(self, point: tuple[str, int], number: int) -> Program:
        """The third client, which sends itself a signal at the point."""
        words = (self.address, self.token, self.policy, self.deadline_s, *point, int(number))
        return Program("tests.edge.gone_client", *words)

    def begin(self, expected: tuple[str, ...] = (NAME, *OTHERS)) -> "list[Future[FitStats]]":
        """Begin a round: the two others train; the third has to be started beside."""
        self.here.service.expect(expected, round=0, at_once=3, close_after=3)
        members = [self.here.members[name] for name in OTHERS]
        groups = [[[batch(10 * i + step)] for step in range(STEPS)] for i in (1, 2)]
        return [
            self.pool.submit(member.trainer.fit, mine)
            for member, mine in zip(members, groups, strict=True)
        ]

    def assert_nothing_held(self) -> None:
        """All that clients held is freed: sessions, graphs, gradients, contributions, replies."""
        engine = self.here.service.engine
        wait_until(lambda: self.here.service.budgets() == self.unused)
        assert (self.here.service.num_sessions, engine.stashed_bytes, engine.num_waiting) == (
            0,
            0,
            0,
        )


@contextmanager
def federation(policy: str, deadline_s: float) -> Iterator[Federation]:
    run = run_of(policy, deadline_s)
    with ExitStack() as stack:
        here = stack.enter_context(world(CONFIG, run))
        server = GrpcServer(here.service, wire=run.wire, limits=here.service.limits, max_clients=9)
        stack.callback(server.stop)
        address, token = server.start(), here.service.admit(NAME)
        unused = here.service.budgets()
        for name in OTHERS:
            link = GrpcLink(address, token=here.service.admit(name), wire=run.wire)
            here.add(name, stack.enter_context(closing(link)))
        pool = stack.enter_context(ThreadPoolExecutor(2))
        yield Federation(here, policy, deadline_s, address, token, pool, unused)


def steps_of(program: Program) -> int:
    """The steps that a client took until its end."""
    code, output, errors = program.end()
    assert code == 0, errors
    return int(output)


def await_the_kill(program: Program) -> None:
    code, _, errors = program.end()
    assert code == -signal.SIGKILL, errors


def until_frozen(program: Program) -> None:
    process = psutil.Process(program.pid)
    wait_until(lambda: process.status() == psutil.STATUS_STOPPED)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "point"),
    [*(("sync", point) for point in POINTS), ("quorum", "backward"), ("async", "forward")],
)
def test_a_client_that_is_killed_holds_nothing_and_may_come_back(policy: str, point: str) -> None:
    with federation(policy, deadline_s=0.3) as fed:
        others = fed.begin()
        await_the_kill(fed.third(POINTS[point], signal.SIGKILL))
        assert [each.result().steps for each in others] == [STEPS, STEPS]
        fed.assert_nothing_held()
        others = fed.begin()
        assert steps_of(fed.third(("none", 1), signal.SIGKILL)) == STEPS
        assert [each.result().steps for each in others] == [STEPS, STEPS]
        fed.assert_nothing_held()


@pytest.mark.parametrize(
    ("policy", "point"),
    [("sync", "forward"), ("sync", "contributed"), ("quorum", "backward"), ("async", "backward")],
)
def test_a_client_that_is_frozen_finishes_when_it_runs_again(policy: str, point: str) -> None:
    with federation(policy, deadline_s=0.3) as fed:
        others = fed.begin()
        with fed.third(POINTS[point], signal.SIGSTOP) as third:
            until_frozen(third)
            assert [each.result().steps for each in others] == [STEPS, STEPS]
            third.send_signal(signal.SIGCONT)
            assert steps_of(third) == STEPS
        fed.assert_nothing_held()


@pytest.mark.parametrize(("point", "before"), [("backward", 1), ("contributed", 2)])
def test_no_step_is_without_a_client_that_is_restarted_at_once(point: str, before: int) -> None:
    """It took `before` steps before it was killed, and then all steps of the round."""
    with federation("sync", deadline_s=60.0) as fed:
        others = fed.begin()
        await_the_kill(fed.third(POINTS[point], signal.SIGKILL))
        assert steps_of(fed.third(("none", 1), signal.SIGKILL)) == STEPS
        assert [each.result().steps for each in others] == [STEPS, STEPS]
        engine = fed.here.service.engine
        assert (engine.version, engine.short_steps) == (STEPS + before, 0)
        fed.assert_nothing_held()
