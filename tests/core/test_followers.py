"""A follower computes for its clients, and the leader steps: what passes between the two."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch

from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.errors import (
    BadTensor,
    ConfigError,
    ConnectionLost,
    Forbidden,
    ModelMismatch,
    NonFinite,
    SessionLost,
    TrunkGone,
    Unauthenticated,
)
from fedsplit.link import Link, LocalLink
from fedsplit.model import connect
from fedsplit.spec import LaunchSpec, PolicySpec, RunSpec
from fedsplit.transport.failover import FailoverLink
from fedsplit.trunk.follower import FollowerService
from fedsplit.trunk.service import TrunkService
from fedsplit.wire import messages as m
from fedsplit.wire import server_messages as s
from simulations.tiny import tiny_config
from tests.core.requests import backward_of, forward_of, step_of
from tests.core.worlds import Member, batch, small_run, wait_until

SECRET = "of-the-servers"


@dataclass
class Servers:
    """A leader and its follower, and clients that were added to one of them."""

    run: RunSpec
    leader: TrunkService
    follower: FollowerService
    to_leader: list["Broken"]

    def add(self, name: str, server: TrunkService) -> Member:
        model = parts_of(self.run).client
        link = LocalLink(server, self.leader.admit(name))
        trunk = RemoteTrunk(link, model, self.run, client=name)
        connect(model, trunk)
        return Member(model=model, trunk=trunk, trainer=ClientTrainer(model, trunk, self.run))

    def ask(self, server: TrunkService, name: str, request: m.Request[m.R]) -> m.R:
        return LocalLink(server, self.leader.admit(name)).exchange(request)

    def weights_agree(self) -> bool:
        here, there = self.leader.engine.training.shared, self.follower.engine.training.shared
        there_values = there.versions.values()
        return here.versions.current == there.versions.current and all(
            torch.equal(there_values[name], value) for name, value in here.versions.values().items()
        )


class Broken(Link):
    """A link to the leader, on which the reply to the next request of a kind can be lost."""

    def __init__(self, leader: TrunkService) -> None:
        self._link = LocalLink(leader, SECRET)
        self.loses: type | None = None

    def exchange(self, request: m.Request[m.R]) -> m.R:
        reply = self._link.exchange(request)
        if self.loses and isinstance(request, self.loses):
            self.loses = None
            raise ConnectionLost("the reply was lost")
        return reply

    def close(self) -> None:
        """Do nothing."""


def parts_of(run: RunSpec):
    from fedsplit.model import initial_parts

    return initial_parts(tiny_config("gpt2", num_hidden_layers=4), run.split, run.seed)


@contextmanager
def servers(run: RunSpec | None = None) -> Iterator[Servers]:
    run = replace(run or small_run(), clients=2)
    links: list[Broken] = []

    def connect_to() -> Link:
        links.append(Broken(leader))
        return links[-1]

    with TrunkService(parts_of(run).trunk, run, servers_token=SECRET) as leader:
        follower = FollowerService(parts_of(run).trunk, run, connect_to, SECRET, name="server-1")
        with follower:
            yield Servers(run, leader, follower, links)
            leader.followers.close()


def test_a_step_waits_for_the_clients_of_all_servers() -> None:
    with servers() as here:
        alice, bob = here.add("alice", here.leader), here.add("bob", here.follower)
        with alice.trunk.session(), bob.trunk.session(), ThreadPoolExecutor() as pool:
            bob.trainer.step([batch(0)])
            assert here.leader.engine.version == 0
            # The second step of bob has to wait for the version of the first one.
            second = pool.submit(bob.trainer.step, [batch(1)])
            alice.trainer.step([batch(2)])
            alice.trunk.close()
            second.result(timeout=20)
            wait_until(lambda: here.leader.engine.version == 2)
            wait_until(here.weights_agree)


def test_a_quorum_steps_without_the_client_of_a_follower() -> None:
    run = small_run(policy=PolicySpec(kind="quorum", quorum=1.0, deadline_s=60.0))
    run = replace(run, policy=replace(run.policy, quorum=1))
    with servers(run) as here:
        alice, bob = here.add("alice", here.leader), here.add("bob", here.follower)
        with alice.trunk.session(), bob.trunk.session():
            alice.trainer.step([batch(0)])
            wait_until(lambda: here.leader.engine.version == 1)
            wait_until(here.weights_agree)
            bob.trainer.step([batch(1)])
            wait_until(lambda: here.leader.engine.version == 2)
            wait_until(here.weights_agree)


def test_the_reply_to_a_contribution_is_lost_and_it_counts_once() -> None:
    with servers() as here:
        bob = here.add("bob", here.follower)
        with bob.trunk.session():
            here.to_leader[0].loses = s.ContributeRequest
            bob.trainer.step([batch(0)])
            wait_until(here.weights_agree)
            assert here.leader.engine.work.take("bob").steps == 1


def test_a_client_that_leaves_its_server_learns_what_became_of_its_step() -> None:
    with servers() as here:
        bob = here.add("bob", here.follower)
        bob.trunk.open()
        request = forward_of(bob)
        here.ask(here.follower, "bob", request)
        here.ask(here.follower, "bob", backward_of(request))
        step = step_of(request)
        with pytest.raises(SessionLost):
            here.ask(here.leader, "bob", step)
        with pytest.raises(SessionLost):
            here.ask(here.leader, "bob", forward_of(bob, call=1))
        reply = here.ask(here.follower, "bob", step)
        assert here.ask(here.leader, "bob", step) == reply == m.StepReply(version=1)
        # Its session is closed at the leader as well, and the step is remembered.
        bob.trunk.close()
        assert not here.leader.num_sessions
        assert here.ask(here.leader, "bob", step) == here.ask(here.follower, "bob", step) == reply


def test_a_follower_reports_the_work_of_its_clients() -> None:
    with servers() as here:
        bob = here.add("bob", here.follower)
        with bob.trunk.session():
            bob.trainer.step([batch(0)])
            wrong = forward_of(bob, call=5)
            with pytest.raises(NonFinite):
                here.ask(
                    here.follower, "bob", replace(wrong, smashed_BTD=wrong.smashed_BTD * torch.nan)
                )
        bob.trainer.evaluate([batch(0)])
        work = here.leader.engine.work.take("bob")
        assert (work.steps, work.positions) == (1, 2 * 24)
        assert here.leader.engine.guard_counts.refused == 1


def test_clients_do_not_pass_as_servers_and_strangers_not_as_clients() -> None:
    with servers() as here:
        contribution = s.ParametersRequest(
            follower="bob", server_instance_id="", version=0, wait_s=0.0
        )
        with pytest.raises(Forbidden, match="parameters is for the servers of the run"):
            here.ask(here.leader, "bob", contribution)
        with pytest.raises(Forbidden):
            here.ask(here.follower, "bob", contribution)
        token = here.leader.admit("bob")
        assert here.follower.check_token(token) == "bob"
        for wrong in ("", "bob", "bob.", token.replace("bob", "eve"), token + "0", SECRET):
            with pytest.raises(Unauthenticated):
                here.follower.check_token(wrong)
        # Its token is right, but it is not of this run any more.
        here.leader.forget("bob")
        with pytest.raises(Unauthenticated):
            LocalLink(here.follower, token).exchange(
                m.OpenRequest(
                    protocol=m.PROTOCOL,
                    client="bob",
                    model="x",
                    config="x",
                    hidden_size=32,
                    round=0,
                    training=True,
                )
            )


def test_a_client_of_a_follower_ends_no_session_of_another() -> None:
    with servers() as here:
        alice, eve = here.add("alice", here.leader), here.add("eve", here.follower)
        as_eve = LocalLink(here.follower, here.leader.admit("eve"))
        with alice.trunk.session():
            with pytest.raises(Forbidden, match="the token belongs to 'eve', not to 'alice'"):
                RemoteTrunk(as_eve, eve.model, here.run, client="alice").open()
            assert here.leader.num_sessions == 1
            alice.trainer.step([batch(0)])
            wait_until(lambda: here.leader.engine.version == 1)


def test_gradients_of_other_parameters_are_refused() -> None:
    with servers() as here:
        bob = here.add("bob", here.follower)
        bob.trunk.open()
        (session,) = here.leader._sessions.names()
        request = s.ContributeRequest(
            session=session,
            call=0,
            step=0,
            num_tokens=1,
            client_sq_norm=0.0,
            loss_scale=1.0,
            num_positions=24,
            barrier_version=0,
            names=("odd",),
            gradients=(torch.ones(2),),
        )
        with pytest.raises(BadTensor, match="a gradient of odd with shape"):
            LocalLink(here.leader, SECRET).exchange(request)


def test_a_follower_takes_over_the_state_of_a_leader_that_was_started_again() -> None:
    with servers() as here:
        bob = here.add("bob", here.follower)
        bob.trunk.open()
        bob.trainer.step([batch(0)])
        wait_until(lambda: here.leader.engine.version == 1)
        again = TrunkService(parts_of(here.run).trunk, here.run, servers_token=SECRET)
        with again:
            for link in here.to_leader:
                link._link = LocalLink(again, SECRET)
            here.leader.followers.close()
            wait_until(lambda: here.follower.server_instance_id == again.server_instance_id)
            assert here.follower.engine.version == 0 and not here.follower.num_sessions
            with pytest.raises(SessionLost):
                bob.trainer.step([batch(1)])
            # The new leader has not admitted it.
            with pytest.raises(Unauthenticated):
                bob.trunk.open()
            again.followers.close()


def test_a_leader_that_trains_other_parameters_is_not_followed() -> None:
    run = small_run()
    with TrunkService(parts_of(run).trunk, run, servers_token=SECRET) as leader:
        other = parts_of(run).trunk
        next(other.parameters()).requires_grad_(False)
        follower = FollowerService(other, run, lambda: Broken(leader), SECRET, name="server-1")
        with pytest.raises(ModelMismatch, match="is not the same at both.*same model, cut and"):
            follower.__enter__()
        leader.followers.close()


def test_settings_that_need_one_server_are_refused() -> None:
    several = {"launch": LaunchSpec(trunk_servers=2)}
    with pytest.raises(ConfigError, match="with policy=async every contribution is a step"):
        small_run(policy=PolicySpec(kind="async"), **several)
    with pytest.raises(ConfigError, match="policy.sim_slowdown has one virtual clock"):
        small_run(policy=PolicySpec(sim_slowdown={"client-0": 2.0}), **several)
    with pytest.raises(ConfigError, match="baseline=fedavg has no trunk"):
        RunSpec(baseline="fedavg", **several)


class Lost(Link):
    """A link to a server that is gone."""

    bytes_up = bytes_down = 0

    def __init__(self, error: type[Exception]) -> None:
        self.error = error
        self.calls = 0

    def exchange(self, request: m.Request[m.R]) -> m.R:
        self.calls += 1
        raise self.error("gone")

    def close(self) -> None:
        """Do nothing."""


def test_a_link_goes_on_to_the_next_server_and_fails_when_all_are_gone() -> None:
    with servers() as here:
        lost = Lost(ConnectionLost)
        link = FailoverLink([lost, LocalLink(here.leader, "")])  # type: ignore[list-item]
        with pytest.raises(ConnectionLost):
            link.exchange(m.ServiceInfoRequest())
        for _ in range(2):
            assert link.stream().begin(m.ServiceInfoRequest())().family == "gpt2"
        assert lost.calls == 1
    gone = FailoverLink([Lost(TrunkGone), Lost(TrunkGone)])  # type: ignore[list-item]
    with pytest.raises(ConnectionLost, match="another server of the run takes over"):
        gone.exchange(m.ServiceInfoRequest())
    with pytest.raises(TrunkGone):
        gone.exchange(m.ServiceInfoRequest())
