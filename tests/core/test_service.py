"""The trunk service: exactly once, expiry, sessions, refusals, and who waits for whom."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from fedsplit import errors
from fedsplit.link import LocalLink
from fedsplit.model import split_model
from fedsplit.spec import PolicySpec
from fedsplit.trunk.service import TrunkService
from fedsplit.wire import messages as m
from tests.core.requests import ask, backward_of, forward_of, step, step_of
from tests.core.worlds import Clock, batch, same, small_run, wait_until, world


def after_one_step(config, times=1):
    """The trunk's weights after one step in which each request is sent `times` times."""
    with world(config) as here:
        alice = here.add("alice")
        alice.trunk.open()
        request = forward_of(alice)
        for each in (request, backward_of(request), step_of(request)):
            replies = [ask(here, "alice", each) for _ in range(times)]
            assert all(reply is replies[0] for reply in replies), "the first reply, again"
    assert here.service.engine.version == 1
    return here.trunk_weights()


def test_a_repeated_request_is_answered_again_and_applied_once(tiny_llama):
    assert same(after_one_step(tiny_llama()), after_one_step(tiny_llama(), times=3))


def test_a_request_repeated_while_it_is_worked_on_shares_its_reply(tiny_llama):
    with world(tiny_llama()) as here, ThreadPoolExecutor(8) as pool:
        alice = here.add("alice")
        alice.trunk.open()
        request = forward_of(alice)
        replies = list(pool.map(lambda _: ask(here, "alice", request), range(8)))
        assert all(reply is replies[0] for reply in replies)


class SlowLink(LocalLink):
    """A link over which the first attempt at every backward takes an hour."""

    def __init__(self, service, token, clock):
        super().__init__(service, token)
        self.clock, self.seen, self.expired = clock, set(), 0

    def exchange(self, request):
        if isinstance(request, m.BackwardRequest) and request.call not in self.seen:
            self.seen.add(request.call)
            self.clock.now += 3600.0
        try:
            return super().exchange(request)
        except errors.ActivationExpired:
            self.expired += 1
            raise


def train(config, *, slow):
    clock = Clock()
    with world(config, clock=clock) as here:
        token = here.service.admit("alice")
        link = SlowLink(here.service, token, clock) if slow else LocalLink(here.service, token)
        alice = here.add("alice", link)
        with alice.trunk.session():
            losses = [alice.trainer.step([batch(i), batch(i + 10)]).loss for i in range(3)]
    assert not slow or link.expired == 6
    return losses, here


def test_an_expired_graph_is_made_again_with_the_same_dropout(tiny_gpt2):
    config = tiny_gpt2(resid_pdrop=0.2, attn_pdrop=0.2)
    losses, kept = train(config, slow=False)
    again, expired = train(config, slow=True)
    assert again == losses
    assert same(expired.trunk_weights(), kept.trunk_weights())
    assert expired.service.engine.stashed_bytes == 0


def test_dropout_depends_on_the_seed(tiny_gpt2):
    config = tiny_gpt2(resid_pdrop=0.2)
    outs = []
    for seed in (0, 1):
        with world(config, small_run()) as here:
            alice = here.add("alice")
            alice.trunk.open(round=seed)
            outs.append(ask(here, "alice", forward_of(alice)).trunk_out_BTD)
    assert not torch.equal(*outs)


# --- who waits for whom ----------------------------------------------------------------------


def wait_until_one_waits(here):
    """Wait until a call waits at the barrier, and still does after a turn of the engine."""
    wait_until(lambda: here.service.engine.num_waiting == 1)
    here.service.close()
    assert here.service.engine.num_waiting == 1


def test_the_forward_after_a_step_waits_for_the_barrier(tiny_llama):
    with world(tiny_llama()) as here, ThreadPoolExecutor(1) as pool:
        alice, bob = here.add("alice"), here.add("bob")
        alice.trunk.open(), bob.trunk.open()
        step(alice, 0)
        assert here.service.engine.version == 0, "bob has not stepped"
        waiting = pool.submit(step, alice, 1)
        wait_until_one_waits(here)
        assert not waiting.done(), "alice is ahead of bob by one step and no more"
        step(bob, 2)
        waiting.result(10.0)
    assert here.service.engine.version == 1


def test_one_that_dies_holds_up_the_others_for_the_deadline_only(tiny_llama):
    clock, run = Clock(), small_run(policy=PolicySpec(deadline_s=5.0))
    with world(tiny_llama(), run, clock) as here, ThreadPoolExecutor(1) as pool:
        alice, bob = here.add("alice"), here.add("bob")
        alice.trunk.open(), bob.trunk.open()
        step(alice, 0)
        waiting = pool.submit(step, alice, 1)  # bob sends nothing
        wait_until_one_waits(here)
        clock.now += 5.0
        here.service.close()  # a turn of the engine
        waiting.result(10.0)
        step(alice, 2)  # though no time passes: bob is not awaited again
        with alice.trunk.session():
            step(alice, 3)
    assert here.service.engine.version == 4


def test_one_that_was_too_late_repeats_its_step_and_is_counted(tiny_llama):
    clock, run = Clock(), small_run(policy=PolicySpec(deadline_s=5.0))
    with world(tiny_llama(), run, clock) as here:
        alice, bob = here.add("alice"), here.add("bob")
        alice.trunk.open(), bob.trunk.open()
        late = batch(1)
        out = bob.model(late.inputs["input_ids"], labels=late.labels, use_cache=False)
        step(alice, 0)
        clock.now += 5.0
        here.service.close()  # a turn of the engine
        wait_until(lambda: here.service.engine.version == 1)
        out.loss.backward()
        with pytest.raises(errors.StaleVersion, match="made with version 0.* trunk is at 1"):
            bob.trunk.step(step=0, num_tokens=1, client_sq_norm=0.0)
        alice.trunk.close()
        stats = bob.trainer.fit([[batch(2)]])
        assert stats.steps == 1


def test_a_broken_connection_leaves_nothing_behind(tiny_llama):
    clock, run = Clock(), small_run(policy=PolicySpec(deadline_s=5.0))
    with world(tiny_llama(), run, clock) as here:
        alice = here.add("alice")
        alice.trunk.open()
        ask(here, "alice", forward_of(alice))
        assert here.service.engine.stashed_bytes > 0
        here.service.disconnected(alice.trunk._named_session())
        clock.now += 4.9
        here.service.expire_sessions()
        assert here.service.engine.stashed_bytes > 0
        clock.now += 0.2
        here.service.expire_sessions()
        wait_until(lambda: here.service.num_sessions == 0)
        assert here.service.engine.stashed_bytes == 0
        with pytest.raises(errors.SessionLost, match="no session .* open a new one"):
            ask(here, "alice", forward_of(alice, call=1))


def test_a_client_that_comes_back_in_time_keeps_its_session(tiny_llama):
    clock, run = Clock(), small_run(policy=PolicySpec(deadline_s=5.0))
    with world(tiny_llama(), run, clock) as here:
        alice = here.add("alice")
        alice.trunk.open()
        request = forward_of(alice)
        ask(here, "alice", request)
        here.service.disconnected(alice.trunk._named_session())
        ask(here, "alice", backward_of(request))
        clock.now += 10.0
        here.service.expire_sessions()
        ask(here, "alice", step_of(request))


def test_a_new_session_replaces_the_clients_old_one(tiny_llama):
    with world(tiny_llama()) as here:
        alice = here.add("alice")
        alice.trunk.open()
        old = forward_of(alice)
        ask(here, "alice", old)
        alice.trunk.open()
        assert here.service.num_sessions == 1
        assert here.service.engine.stashed_bytes == 0
        with pytest.raises(errors.SessionLost):
            ask(here, "alice", backward_of(old))


def test_evaluation_waits_for_nobody(tiny_llama):
    with world(tiny_llama()) as here:
        alice, bob = here.add("alice"), here.add("bob")
        alice.trunk.open(), bob.trunk.open()
        step(alice, 0)
        assert alice.trainer.evaluate([batch(1)]).num_tokens == 22


def test_activation_checkpointing_at_the_trunk_changes_no_number(tiny_gpt2):
    config = tiny_gpt2(resid_pdrop=0.2)

    def final(checkpointing):
        with world(config) as here:
            if checkpointing:
                here.parts.trunk.activation_checkpointing_enable()
            here.add("alice").trainer.fit([batch(i), batch(i + 10)] for i in range(3))
        return here.trunk_weights()

    assert same(final(True), final(False))


# --- refusals --------------------------------------------------------------------------------

OPEN = dict(
    protocol=m.PROTOCOL, client="alice", model="", config="", hidden_size=16, round=0, training=True
)

REFUSED_AT_OPEN = [
    pytest.param(
        {"protocol": 99},
        errors.ProtocolVersion,
        f"protocol 99, the trunk {m.PROTOCOL}",
        id="protocol",
    ),
    pytest.param(
        {"client": "bob"}, errors.Forbidden, "belongs to 'alice', not to 'bob'", id="name"
    ),
    pytest.param({"hidden_size": 8}, errors.ModelMismatch, "has 8, the trunk 16", id="hidden size"),
    pytest.param({"model": "cafe"}, errors.ModelMismatch, "the client has cafe", id="model"),
    pytest.param({"config": "cafe"}, errors.ModelMismatch, "run configuration", id="configuration"),
]


@pytest.mark.parametrize(("changes", "error", "text"), REFUSED_AT_OPEN)
def test_a_client_that_does_not_fit_is_refused_and_others_are_served(
    tiny_llama, changes, error, text
):
    with world(tiny_llama()) as here:
        alice = here.add("alice")
        right = dict(model=alice.trunk._identity["model"], config=here.run.fingerprint)
        with pytest.raises(error, match=text):
            ask(here, "alice", m.OpenRequest(**(OPEN | right | changes)))
        with alice.trunk.session():
            step(alice, 0)


def test_a_trunk_without_values_is_not_served(tiny_llama):
    with torch.device("meta"):
        trunk = split_model(LlamaForCausalLM(tiny_llama()), "1/*/1").trunk
    with pytest.raises(errors.ConfigError, match="the trunk is on the meta device"):
        TrunkService(trunk, small_run())


def test_a_wrong_token_opens_nothing(tiny_llama):
    with world(tiny_llama()) as here:
        alice = here.add("alice", LocalLink(here.service, "guess"))
        with pytest.raises(errors.Unauthenticated, match="token is missing or not one of this run"):
            alice.trunk.open()


def test_a_session_is_its_owners(tiny_llama):
    with world(tiny_llama()) as here:
        alice = here.add("alice")
        alice.trunk.open()
        with pytest.raises(errors.Forbidden, match="belongs to another client"):
            ask(here, "mallory", forward_of(alice))


def bad(value):
    def make(alice):
        request = forward_of(alice)
        smashed_BTD = request.smashed_BTD.clone()
        smashed_BTD[0, 0, 0] = value
        return replace(request, smashed_BTD=smashed_BTD)

    return make


REFUSED_REQUESTS = [
    pytest.param(bad(float("nan")), errors.NonFinite, "smashed_BTD holds 1 of 384", id="nan"),
    pytest.param(bad(float("inf")), errors.NonFinite, "smashed_BTD holds 1 of 384", id="inf"),
    pytest.param(
        lambda alice: forward_of(alice, smashed_BTD=torch.zeros(2, 12, 8)),
        errors.BadTensor,
        "hidden size is 16",
        id="width",
    ),
    pytest.param(
        lambda alice: forward_of(alice, smashed_BTD=torch.zeros(9, 12, 16)),
        errors.TooLarge,
        "at most 2 of 12",
        id="rows",
    ),
    pytest.param(
        lambda alice: forward_of(alice, smashed_BTD=torch.zeros(2, 12, 16, dtype=torch.float64)),
        errors.BadTensor,
        "float64, but this trunk computes in torch.float32",
        id="dtype",
    ),
    pytest.param(
        lambda alice: forward_of(
            alice, smashed_BTD=torch.zeros(2, 6, 16), attention_mask_BT=torch.ones(2, 12).long()
        ),
        errors.BadTensor,
        "only a session that generates may have cached",
        id="mask of a cache",
    ),
    pytest.param(
        lambda alice: backward_of(forward_of(alice, smashed_BTD=torch.ones(1, 1, 16).double())),
        errors.BadTensor,
        "grad_trunk_out_BTD is torch.float64",
        id="dtype of a gradient",
    ),
    pytest.param(
        lambda alice: step_of(forward_of(alice), num_tokens=0),
        errors.ProtocolError,
        "num_tokens=0 must be at least 1",
        id="step of nothing",
    ),
    pytest.param(
        lambda alice: backward_of(forward_of(alice, call=5)),
        errors.ProtocolError,
        "needs an outstanding forward",
        id="backward without forward",
    ),
    pytest.param(
        lambda alice: step_of(forward_of(alice)),
        errors.ProtocolError,
        "needs a backward",
        id="step",
    ),
]


@pytest.mark.parametrize(("make", "error", "text"), REFUSED_REQUESTS)
def test_a_bad_request_is_refused_and_changes_nothing(tiny_llama, make, error, text):
    with world(tiny_llama()) as here:
        alice, bob = here.add("alice"), here.add("bob")
        bob.trunk.open(), alice.trunk.open()
        before = here.trunk_weights()
        with pytest.raises(error, match=text):
            ask(here, "alice", make(alice))
        assert same(here.trunk_weights(), before)
        alice.trunk.close()
        step(bob, 0)
        bob.trunk.close()
    assert here.service.engine.version == 1


def test_nonfinite_gradients_never_reach_a_parameter(tiny_llama):
    with world(tiny_llama()) as here:
        alice = here.add("alice")
        alice.trunk.open()
        request = forward_of(alice)
        ask(here, "alice", request)
        with pytest.raises(errors.NonFinite, match="grad_trunk_out_BTD"):
            ask(here, "alice", backward_of(request, scale=float("nan")))
        with pytest.raises(errors.ProtocolError, match="nothing to step with"):
            ask(here, "alice", step_of(request))


def test_a_client_in_quarantine_leaves_no_session(tiny_llama):
    """Nobody could close one whose reply was an error."""
    with world(tiny_llama()) as here:
        alice = here.add("alice")
        alice.trunk.open()
        for call in range(3):
            request = forward_of(alice, call=call)
            ask(here, "alice", request)
            with pytest.raises(errors.NonFinite):
                ask(here, "alice", backward_of(request, scale=float("nan")))
        with pytest.raises(errors.Quarantined):
            alice.trunk.open()
        here.service.close()  # the engine has done what came before
        assert here.service.num_sessions == 0


LIES = [
    pytest.param({"num_tokens": 25}, "num_tokens=25 for a step of 24 positions", id="tokens"),
    pytest.param({"step": 10**9}, "clients of this run take at most 960 steps", id="steps"),
    pytest.param({"loss_scale": math.inf}, "loss_scale=inf must be finite", id="scale"),
]


@pytest.mark.parametrize(("lie", "text"), LIES)
def test_a_step_that_cannot_be_is_refused_and_changes_nothing(tiny_llama, lie, text):
    with world(tiny_llama()) as here:
        alice = here.add("alice")
        alice.trunk.open()
        before, request = here.trunk_weights(), forward_of(alice)
        ask(here, "alice", request), ask(here, "alice", backward_of(request))
        with pytest.raises(errors.ProtocolError, match=text):
            ask(here, "alice", step_of(request, **lie))
        assert same(here.trunk_weights(), before)
        assert here.service.engine.steps == 0


# --- what one can ask ------------------------------------------------------------------------


def test_gradients_and_training_state_and_info(tiny_llama):
    with world(tiny_llama()) as here:
        alice = here.add("alice")
        with alice.trunk.session(round=3):
            loss = alice.model(batch().inputs["input_ids"], labels=batch().labels).loss
            loss.backward()
            told = alice.trunk.gradients(tensors=True)
            assert sorted(told.norms) == ["model.layers.1", "model.layers.2"]
            assert alice.trunk.trunk_sq_norm == pytest.approx(
                sum(n**2 for n in told.norms.values())
            )
            assert set(told.names) == set(here.trunk_weights())
            assert alice.trunk.gradients().gradients == ()
            alice.trunk.step(step=0, num_tokens=1, client_sq_norm=0.0)
        with alice.trunk.session(round=4):
            state = alice.trunk.training_state()
        assert (state.step, state.version, state.lr) == (1, 1, 0.1)
        info = alice.trunk.service_info()
        assert (info.family, info.blocks, info.version, info.sessions) == ("llama", "1/*/1", 1, 0)
