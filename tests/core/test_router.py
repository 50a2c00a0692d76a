"""Several trunks behind one door: who gets to which, and who is remembered."""

import math
from collections.abc import Iterator
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.errors import ConfigError, Internal, ModelMismatch, SessionLost, Unauthenticated
from fedsplit.link import LocalLink
from fedsplit.model import connect, initial_parts
from fedsplit.spec import DataSpec
from fedsplit.trunk.router import TrunkRouter
from fedsplit.trunk.service import TrunkService
from fedsplit.wire import messages as m
from tests.core.worlds import Clock, batch, fail, small_run

RUN = small_run()
SEEDS = {"one": 1, "two": 2}


@pytest.fixture
def here(tiny_llama) -> Iterator[SimpleNamespace]:
    """A hub of two trunks of one model, `one` and `two`, and its clock."""
    config, clock = tiny_llama(), Clock()
    services = {
        name: TrunkService(initial_parts(config, RUN.split, seed).trunk, RUN)
        for name, seed in SEEDS.items()
    }
    with TrunkRouter(services, clock=clock) as router:
        yield SimpleNamespace(router=router, clock=clock, config=config, services=services)


def arrive(here: SimpleNamespace, client: str, served: str = "", token: str = "") -> RemoteTrunk:
    model = initial_parts(here.config, RUN.split, SEEDS.get(served, 1)).client
    trunk = RemoteTrunk(
        LocalLink(here.router, token), model, RUN, client=client, served_model_name=served
    )
    connect(model, trunk)
    trunk.model = model
    return trunk


@pytest.mark.parametrize("served, name", [("", "one"), ("one", "one"), ("two", "two")])
def test_a_client_gets_to_the_trunk_it_names(served, name, here):
    trunk = arrive(here, "ann", served)
    trunk.open(training=False)
    hidden_BTD = torch.randn(1, 3, 16)
    with torch.no_grad():
        out_BTD = trunk(hidden_BTD)
    expected = initial_parts(here.config, RUN.split, SEEDS[name]).trunk
    assert torch.equal(out_BTD, expected.run(hidden_BTD).detach())
    assert trunk.service_info().sessions == here.services[name].num_sessions == 1
    assert trunk.service_info().served_model_names == ("one", "two")


@pytest.mark.parametrize("ask", ["open", "service_info"])
def test_an_unknown_name_is_told_what_there_is(ask, here):
    with pytest.raises(ModelMismatch, match="no trunk is served as 'three' here; there is one, tw"):
        getattr(arrive(here, "ann", "three"), ask)()


def test_each_trunk_trains_by_itself(here):
    for client, served, steps in (("ann", "one", 2), ("bob", "two", 1)):
        trunk = arrive(here, client, served)
        trainer = ClientTrainer(trunk.model, trunk, RUN)
        with trunk.session():
            for seed in range(steps):
                trainer.step([batch(seed)])
    infos = [arrive(here, "eve", name).service_info() for name in ("one", "two")]
    assert [info.version for info in infos] == [2, 1]


def test_one_client_may_be_at_two_trunks(here):
    both = [arrive(here, "ann", name) for name in ("one", "two")]
    for trunk in both:
        trunk.open()
    assert [service.num_sessions for service in here.services.values()] == [1, 1]
    for trunk in both:
        trunk.close()
    assert [service.num_sessions for service in here.services.values()] == [0, 0]


def test_a_session_that_is_closed_or_was_never_there_is_lost(here):
    trunk = arrive(here, "ann")
    trunk.open()
    session = trunk._named_session()
    trunk.close()
    for name in (session, "never-there"):
        with pytest.raises(SessionLost, match=f"no session {name} here"):
            here.router.handle(m.TrainingStateRequest(session=name), "")


def test_a_session_that_its_trunk_has_lost_is_forgotten_at_once(here):
    trunk = arrive(here, "ann")
    trunk.open()
    session = trunk._named_session()
    here.services["one"]._drop(here.services["one"]._sessions._open[session])
    with pytest.raises(SessionLost):
        trunk.training_state()
    assert session not in here.router._sessions


def test_who_left_is_forgotten_after_a_while_and_who_is_there_is_not(here):
    gone, cut_off, there = (arrive(here, name) for name in ("gone", "cut-off", "there"))
    for trunk in (gone, cut_off, there):
        trunk.open()
    gone.close()
    cut_off_session = cut_off._named_session()
    here.services["one"]._drop(here.services["one"]._sessions._open[cut_off_session])
    here.clock.now = 599.0
    arrive(here, "other").open()
    assert here.router.num_clients == 4
    here.clock.now = 601.0
    arrive(here, "another").open()
    assert here.router.num_clients == 3
    assert there.training_state().round == 0
    assert cut_off_session not in here.router._sessions


def test_who_is_heard_of_is_remembered(here):
    trunk = arrive(here, "ann")
    trunk.open()
    here.clock.now = 601.0
    trunk.training_state()
    trunk.close()
    arrive(here, "bob").open()
    assert here.router.num_clients == 2


def test_a_broken_connection_is_told_to_the_right_trunk(here):
    trunk = arrive(here, "ann", "two")
    trunk.open()
    trunk.training_state()
    session = trunk._named_session()
    here.router.disconnected("never-there")
    here.router.disconnected(session)
    assert here.services["two"]._sessions._open[session].expires_at < math.inf
    trunk.training_state()
    assert here.services["two"]._sessions._open[session].expires_at == math.inf


def test_a_trunk_that_failed_leaves_the_others_at_work(here):
    at_one, at_two = arrive(here, "ann", "one"), arrive(here, "ann", "two")
    at_one.open(), at_two.open()
    fail(here.services["one"])
    here.clock.now = 601.0  # both clients of the name are forgotten now
    arrive(here, "bob", "two").open()
    with pytest.raises(Internal, match="the trunk failed at version 0"):
        arrive(here, "bob", "one").open()
    assert type(here.router.trunks["one"].exception()) is ZeroDivisionError
    assert not here.router.trunks["two"].done()


@pytest.mark.parametrize("token", ["", "another", "\u00e9"])
def test_a_door_with_a_token_opens_to_no_other(token, here):
    guarded = TrunkRouter(here.services, token="secret")
    refused = pytest.raises(Unauthenticated, match="not the one of this trunk server")
    with refused:
        guarded.check_token(token)
    here.router = guarded
    with refused:
        arrive(here, "ann", token=token).open()
    assert arrive(here, "ann", token=token).service_info().served_model_names == ("one", "two")
    arrive(here, "ann", token="secret").open()


def test_limits_are_the_largest_of_all(tiny_llama):
    wide, long = (
        TrunkService(initial_parts(tiny_llama(hidden_size=size), RUN.split, 0).trunk, run)
        for size, run in ((32, RUN), (16, small_run(data=DataSpec(sequence_length=40))))
    )
    limits = TrunkRouter({"wide": wide, "long": long}).limits
    assert (limits.hidden_size, limits.max_tokens, limits.max_rows) == (32, 40, 2)
    assert len(fields(limits)) == 5


def test_a_hub_has_a_trunk():
    with pytest.raises(ConfigError, match="there is no trunk to serve"):
        TrunkRouter({})
