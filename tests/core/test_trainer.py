"""The client's loop against an ordinary loop on the unsplit model."""

from dataclasses import replace

import pytest
import torch
from transformers import GPT2ForSequenceClassification

from fedsplit import errors
from fedsplit.client.objective import ClientObjective
from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.client.unsplit import NoTrunk
from fedsplit.data import Batch
from fedsplit.link import LocalLink
from fedsplit.model import connect, initial_parts, join_model
from fedsplit.model.lora import add_adapters, trainable
from fedsplit.optimization import PartOptimizer, clip_coefficient
from fedsplit.spec import LoraSpec, PolicySpec, TrainSpec
from fedsplit.trunk.service import TrunkService
from fedsplit.wire import messages as m
from tests.core.worlds import Clock, batch, same, small_run, wait_until, world


def unsplit_loss(model, each):
    return model(**each.inputs, labels=each.labels).loss


def test_accumulated_batches_are_one_batch_weighted_by_tokens(tiny_llama):
    batches = [batch(0), batch(1, pad=7), batch(2, rows=1)]
    with world(tiny_llama()) as here:
        alice = here.add("alice")
        whole = join_model(alice.model, here.parts.trunk)
        with alice.trunk.session():
            stats = alice.trainer.step(batches)
    total = sum(b.num_tokens for b in batches)
    loss = sum(unsplit_loss(whole, b) * b.num_tokens for b in batches) / total
    loss.backward()
    PartOptimizer(trainable(whole), here.run.train).step(0)
    assert stats.num_tokens == total == 22 + 15 + 11
    assert stats.loss == pytest.approx(loss.item(), abs=1e-6)
    after = join_model(alice.model, here.parts.trunk).state_dict()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=0)


def test_clipping_is_by_the_norm_of_all_three_parts(tiny_llama):
    run = small_run(train=replace(small_run().train, clip_norm=0.05))
    with world(tiny_llama(), run) as here:
        alice = here.add("alice")
        whole = join_model(alice.model, here.parts.trunk)
        with alice.trunk.session():
            alice.trainer.step([batch()])
    unsplit_loss(whole, batch()).backward()
    norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.05)
    assert norm > 0.05, "else nothing is clipped here"
    torch.optim.SGD(whole.parameters(), lr=0.1).step()
    after = join_model(alice.model, here.parts.trunk).state_dict()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(after[name], tensor, atol=1e-7, rtol=0)


LORA_ON_THE_TRUNK = LoraSpec(enabled=True, rank=2, alpha=4, bottom=False, top=False)


def test_the_gradient_reaches_the_trunk_when_everything_at_the_client_is_frozen(tiny_llama):
    run = small_run(lora=LORA_ON_THE_TRUNK)
    parts = initial_parts(tiny_llama(), run.split, run.seed)
    for part in (parts.client, parts.trunk):
        add_adapters(part, run.lora, run.seed)
    assert not trainable(parts.client)
    before = {k: p.detach().clone() for k, p in trainable(parts.trunk).items()}
    frozen = {k: p.detach().clone() for k, p in parts.client.named_parameters()}
    with TrunkService(parts.trunk, run) as service:
        trunk = RemoteTrunk(
            LocalLink(service, service.admit("alice")), parts.client, run, client="alice"
        )
        connect(parts.client, trunk)
        ClientTrainer(parts.client, trunk, run).fit([[batch(0)], [batch(1)]])
    moved = {k for k, p in trainable(parts.trunk).items() if not torch.equal(p, before[k])}
    assert {k for k in before if "lora_B" in k} <= moved, "lora_A follows once lora_B is not 0"
    assert same(dict(parts.client.named_parameters()), frozen)


class SmallLogits(ClientObjective):
    """The model's loss and a penalty on the size of its logits."""

    def loss(self, prediction):
        return prediction.loss + penalty(prediction.logits)


def penalty(logits_BTC):
    return 0.1 * logits_BTC.square().mean()


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_an_objective_trains_all_three_parts_and_the_models_loss_is_reported(
    tiny_llama, micro_batches
):
    run = small_run(train=replace(small_run().train, micro_batches=micro_batches))
    with world(tiny_llama(), run) as here:
        alice = here.add("alice")
        whole = join_model(alice.model, here.parts.trunk)
        trainer = ClientTrainer(alice.model, alice.trunk, run, objective=SmallLogits)
        stats = trainer.fit([[batch(0)], [batch(1)]])
        held_out = trainer.evaluate([batch(2)])
        after = join_model(alice.model, here.parts.trunk).state_dict()
    optimizer, losses = torch.optim.SGD(whole.parameters(), lr=run.train.lr), []
    for each in (batch(0), batch(1)):
        optimizer.zero_grad()
        output = whole(**each.inputs, labels=each.labels)
        (output.loss + penalty(output.logits)).backward()
        optimizer.step()
        losses.append(output.loss.item())
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=0)
    assert stats.loss == pytest.approx(sum(losses) / 2, abs=1e-6)
    loss = unsplit_loss(whole.eval(), batch(2)).item()
    assert held_out.nats == pytest.approx(loss * held_out.num_tokens, abs=1e-4)


def test_evaluation_is_the_unsplit_models(tiny_gpt2):
    config = tiny_gpt2(resid_pdrop=0.3)
    batches = [batch(0), batch(1, pad=5)]
    with world(config) as here:
        alice = here.add("alice")
        whole = join_model(alice.model, here.parts.trunk).eval()
        stats = alice.trainer.evaluate(batches)
    nats = sum(unsplit_loss(whole, b).item() * b.num_tokens for b in batches)
    assert stats.nats == pytest.approx(nats, abs=1e-5)
    assert (stats.num_tokens, stats.num_bytes) == (22 + 17, 22 + 17)


class Forgetful(LocalLink):
    """A link whose trunk drops the session before some forwards, by number."""

    def __init__(self, service, token, lost):
        super().__init__(service, token)
        self.lost, self.count = lost, 0

    def exchange(self, request):
        if isinstance(request, m.ForwardRequest):
            if self.count in self.lost:
                super().exchange(m.CloseRequest(session=request.session))
            self.count += 1
        return super().exchange(request)


def evaluated(config, lost):
    with world(config) as here:
        link = Forgetful(here.service, here.service.admit("alice"), lost)
        return here.add("alice", link).trainer.evaluate([batch(0), batch(1), batch(2)])


def test_evaluation_goes_on_in_a_new_session(tiny_llama):
    assert evaluated(tiny_llama(), [1]) == evaluated(tiny_llama(), [])


def test_evaluation_of_a_batch_is_tried_twice_and_no_more(tiny_llama):
    with pytest.raises(errors.SessionLost):
        evaluated(tiny_llama(), [1, 2])


def test_hits_are_counted_for_classes_and_not_for_tokens(tiny_gpt2):
    config = tiny_gpt2(num_labels=3, pad_token_id=0)
    rows = [batch(i).inputs for i in range(4)]
    run = small_run(task="sequence_classification")
    parts = initial_parts(config, run.split, 0, model_class=GPT2ForSequenceClassification)
    whole = join_model(parts.client, parts.trunk).eval()
    with torch.no_grad():
        found = [whole(**row).logits.argmax(dim=-1) for row in rows]
    truth = [classes.clone() for classes in found]
    truth[2][0] = (truth[2][0] + 1) % 3
    batches = [
        Batch(inputs=row, labels=labels, num_tokens=2, num_bytes=0)
        for row, labels in zip(rows, truth, strict=True)
    ]
    trainer = ClientTrainer(parts.client, NoTrunk(parts.client, client="alice"), run)
    assert trainer.evaluate(batches).counts["correct"] == 7
    assert evaluated(tiny_gpt2(), []).counts["correct"] == 0


class Poison(LocalLink):
    """A link over which the trunk's answers to some forwards come back as NaN."""

    def __init__(self, service, token, calls):
        super().__init__(service, token)
        self.calls = calls

    def exchange(self, request):
        reply = super().exchange(request)
        if isinstance(request, m.ForwardRequest) and request.call in self.calls:
            return replace(reply, trunk_out_BTD=reply.trunk_out_BTD * float("nan"))
        return reply


def poisoned(config, calls):
    with world(config) as here:
        alice = here.add("alice", Poison(here.service, here.service.admit("alice"), calls))
        stats = alice.trainer.fit([batch(i)] for i in range(5))
    assert all(p.isfinite().all() for p in here.parts.trunk.parameters())
    assert all(p.isfinite().all() for p in alice.model.parameters())
    return stats


def test_a_batch_that_is_not_finite_is_skipped(tiny_llama):
    stats = poisoned(tiny_llama(), calls={1, 3})
    assert (stats.steps, stats.skipped) == (3, 2)


def test_three_in_a_row_end_the_round(tiny_llama):
    with pytest.raises(errors.NonFinite):
        poisoned(tiny_llama(), calls={1, 2, 3})


class Late(LocalLink):
    """A link whose client is too late with some of its steps, by number of the attempt."""

    def __init__(self, service, token, attempts):
        super().__init__(service, token)
        self.attempts, self.tried, self.calls = attempts, 0, []

    def exchange(self, request):
        if isinstance(request, m.ForwardRequest):
            self.calls.append(request.call)
        if isinstance(request, m.StepRequest):
            self.tried += 1
            if self.tried - 1 in self.attempts:
                raise errors.StaleVersion("the trunk has moved on; repeat the step")
        return super().exchange(request)


def fit_late(config, attempts, numbers):
    """Four batches in groups of two, of the given numbers; what came of them at both sides."""
    with world(config) as here:
        link = Late(here.service, here.service.admit("alice"), attempts)
        alice = here.add("alice", link)
        stats = alice.trainer.fit([batch(i), batch(i + 50, pad=3)] for i in numbers)
    assert alice.trainer.steps == here.service.engine.version == stats.steps
    return stats, link.calls, here.trunk_weights(), dict(alice.model.named_parameters())


def test_a_step_that_is_always_too_late_is_given_up_and_changes_nothing(tiny_llama):
    stats, calls, trunk, client = fit_late(tiny_llama(), {1, 2, 3}, [0, 1, 2])
    assert (stats.steps, stats.refused, stats.repeated, stats.skipped) == (2, 1, 0, 0)
    assert calls == [0, 1, *[2, 3] * 3, 4, 5], "dropout is that of the batch, at every attempt"
    _, _, wanted_trunk, wanted_client = fit_late(tiny_llama(), (), [0, 2])
    assert same(trunk, wanted_trunk)
    assert same(client, wanted_client)


def test_a_step_that_is_in_time_at_last_counts_once(tiny_llama):
    stats, calls, trunk, client = fit_late(tiny_llama(), {1, 2}, [0, 1])
    assert (stats.steps, stats.refused, stats.repeated) == (2, 0, 2)
    _, _, wanted_trunk, wanted_client = fit_late(tiny_llama(), (), [0, 1])
    assert same(trunk, wanted_trunk)
    assert same(client, wanted_client)


def test_who_is_always_too_late_ends_the_round_without_a_step(tiny_llama):
    stats, *_ = fit_late(tiny_llama(), range(100), range(4))
    assert (stats.steps, stats.refused, stats.num_tokens) == (0, 4, 0)


class Overtaken(LocalLink):
    """A link on which somebody else steps before each of the first steps arrives."""

    def __init__(self, service, token, overtakes):
        super().__init__(service, token)
        self.overtakes = overtakes

    def exchange(self, request):
        if isinstance(request, m.StepRequest) and self.overtakes:
            self.overtakes.pop()()
        return super().exchange(request)


def test_a_slow_client_under_an_asynchronous_trunk_goes_on(tiny_llama):
    run = small_run(policy=PolicySpec(kind="async", max_staleness=0))
    with world(tiny_llama(), run) as here:
        bob = here.add("bob")
        overtakes = [lambda: bob.trainer.step([batch(9)])] * 4
        link = Overtaken(here.service, here.service.admit("alice"), overtakes)
        alice = here.add("alice", link)
        with bob.trunk.session():
            stats = alice.trainer.fit([batch(i)] for i in range(3))
        assert here.service.engine.version == 4 + 2
        assert here.service.engine.stashed_bytes == 0
    assert (stats.steps, stats.refused, stats.repeated) == (2, 1, 1)


class Flaky(LocalLink):
    """A link that loses the reply of every third exchange, after the trunk has worked."""

    def __init__(self, service, token):
        super().__init__(service, token)
        self.count = 0

    def exchange(self, request):
        reply = super().exchange(request)
        self.count += 1
        if self.count % 3 == 0:
            raise errors.ConnectionLost("the reply was lost", retry_after_s=1e-3)
        return reply


def test_lost_replies_change_no_number(tiny_llama):
    def final(flaky):
        with world(tiny_llama()) as here:
            token = here.service.admit("alice")
            link = (Flaky if flaky else LocalLink)(here.service, token)
            alice = here.add("alice", link)
            stats = alice.trainer.fit([batch(i), batch(i + 50)] for i in range(6))
        return stats, here.trunk_weights(), dict(alice.model.named_parameters())

    (stats, trunk, client), (other, trunk_too, client_too) = final(False), final(True)
    assert stats == other
    assert same(trunk, trunk_too)
    assert same(client, client_too)


class LosesOne(LocalLink):
    """A link that loses the first reply of a kind, and is down until `clock` is at `back_at`."""

    def __init__(self, service, token, kind, clock, back_at):
        super().__init__(service, token)
        self.kind, self.clock, self.back_at = kind, clock, back_at

    def exchange(self, request):
        reply = super().exchange(request)
        if self.kind and isinstance(request, self.kind):
            self.kind = None
            if self.back_at:
                self._service.disconnected(request.session)
                self.clock.now = self.back_at
                self._service.expire_sessions()
                wait_until(lambda: self._service.num_sessions == 0)
            raise errors.ConnectionLost("the reply was lost")
        return reply


LOST = [
    pytest.param(m.OpenRequest, 0.0, id="open"),
    pytest.param(m.CloseRequest, 0.0, id="close"),
    pytest.param(m.StepRequest, 60.0, id="step, and away until the session is gone"),
]


@pytest.mark.parametrize(("kind", "back_at"), LOST)
def test_a_lost_reply_is_made_good_once(tiny_llama, kind, back_at):
    def final(kind):
        clock = Clock()
        with world(tiny_llama(), small_run(), clock) as here:
            link = LosesOne(here.service, here.service.admit("alice"), kind, clock, back_at)
            alice = here.add("alice", link)
            stats = alice.trainer.fit([batch(i)] for i in range(2))
        assert here.service.engine.version == stats.steps == 2
        return stats.loss, here.trunk_weights(), dict(alice.model.named_parameters())

    (loss, trunk, client), (other, trunk_too, client_too) = final(kind), final(None)
    assert loss == other
    assert same(trunk, trunk_too)
    assert same(client, client_too)


@pytest.mark.parametrize("clip", ["global", "parts"])
def test_clipping_and_schedule_are_those_of_two_ordinary_optimizers(tiny_llama, clip):
    train = replace(small_run().train, clip=clip, clip_norm=0.05, optimizer="adamw", warmup_steps=2)
    groups = [[batch(i), batch(i + 10)] for i in range(3)]
    with world(tiny_llama(), small_run(train=train)) as here:
        alice = here.add("alice")
        whole = join_model(alice.model, here.parts.trunk)
        trunk_names = {name for name, _ in here.parts.trunk.named_parameters()}
        alice.trainer.fit(groups)
        found = join_model(alice.model, here.parts.trunk).state_dict()
    everything = trainable(whole)
    ends = {k: p for k, p in everything.items() if k not in trunk_names}
    trunk = {k: p for k, p in everything.items() if k in trunk_names}
    parts = [everything] if clip == "global" else [ends, trunk]
    optimizers = [PartOptimizer(part, train) for part in parts]
    for step, group in enumerate(groups):
        for each in group:
            (unsplit_loss(whole, each) * 0.5).backward()
        for optimizer in optimizers:
            sq_norm = optimizer.sq_norm()
            assert sq_norm > 0.05**2, "else nothing is clipped here"
            optimizer.step(step, clip_coefficient(sq_norm, 0.05))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)


def test_the_schedule_is_in_step_at_both_sides(tiny_llama):
    train = TrainSpec(rounds=2, local_steps=2, batch_size=2, warmup_steps=2, lr=0.1)
    with world(tiny_llama(), small_run(train=train)) as here:
        alice = here.add("alice")
        seen = []
        for i in range(4):
            with alice.trunk.session(round=i):
                alice.trainer.step([batch(i)])
            with alice.trunk.session(round=i):
                seen.append(alice.trunk.training_state())
    assert [state.step for state in seen] == [1, 2, 3, 4] == [i + 1 for i in range(4)]
    assert [state.lr for state in seen] == [train.lr_at(i) for i in (1, 2, 3, 4)]
