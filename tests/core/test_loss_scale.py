"""Training under float16: the loss is scaled by one factor at both sides, as torch scales it."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.client.scaling import INITIAL_SCALE, LossScale
from fedsplit.client.trainer import ClientTrainer
from fedsplit.client.unsplit import NoTrunk
from fedsplit.errors import NonFinite, ProtocolError
from fedsplit.link import LocalLink
from fedsplit.model import join_model
from fedsplit.model.acceleration import precision_of
from fedsplit.model.describe import config_of, parts_of
from fedsplit.spec import ModelSpec, WireSpec
from fedsplit.wire import messages as m
from tests.core.worlds import batch, same, small_run, world

NUM_STEPS = 4
FLOAT16 = ModelSpec(autocast="float16")
HUGE = LossScale(value=2.0**40)
"""A scale that overflows float16 at once, and has to fall until it does not."""


def run_with(*, wire=None, model=FLOAT16, **train):
    run = small_run(model=model, wire=replace(WireSpec(budget_s=10.0), **(wire or {})))
    return replace(run, train=replace(run.train, **train))


def groups(steps=NUM_STEPS):
    return [[batch(i), batch(i + 10, pad=4)] for i in range(steps)]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def largest_gap(ours, theirs):
    return max((ours[k] - theirs[k]).abs().max().item() for k in theirs)


def whole_of(config, run):
    with world(config, run) as here:
        return join_model(here.add("judge").model, here.parts.trunk)


class Noting(LocalLink):
    """A link that notes the steps that cross it and may change what the trunk says of itself."""

    autocast = "float16"

    def __init__(self, service, token):
        super().__init__(service, token)
        self.steps = []

    def exchange(self, request):
        reply = super().exchange(request)
        if isinstance(request, m.StepRequest):
            self.steps.append(request)
        if isinstance(reply, m.OpenReply):
            return replace(reply, autocast=self.autocast)
        return reply


def split_fit(config, run, *, scale=INITIAL_SCALE, steps=NUM_STEPS, link=Noting):
    """The whole model after some steps of one client, its trainer, what it said of them, and the
    steps that crossed.
    """
    with world(config, run) as here:
        noting = link(here.service, here.service.admit("alice"))
        alice = here.add("alice", noting)
        alice.trainer.loss_scale = scale
        stats = alice.trainer.fit(groups(steps))
        return join_model(alice.model, here.parts.trunk), alice.trainer, stats, noting.steps


def with_torchs_scaler(config, run, *, scale=65536.0, steps=NUM_STEPS):
    """The unsplit model after the same steps in plain torch, and its scaler."""
    whole = whole_of(config, run).train()
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[run.train.optimizer]
    adam = dict(betas=(run.train.beta1, run.train.beta2), eps=run.train.eps, weight_decay=0.0)
    options = {} if kind is torch.optim.SGD else adam
    optimizer = kind(whole.parameters(), lr=run.train.lr, fused=True, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for group in groups(steps):
        optimizer.zero_grad()
        num_tokens = sum(each.num_tokens for each in group)
        for each in group:
            with torch.autocast("cpu", dtype=torch.float16):
                loss = whole(**each.inputs, labels=each.labels).loss
            scaler.scale(loss * (each.num_tokens / num_tokens)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(whole.parameters(), run.train.clip_norm or math.inf)
        scaler.step(optimizer)
        scaler.update()
    return whole, scaler


# --- the scale itself ---------------------------------------------------------------------------


@given(st.lists(st.booleans() | st.integers(1, 2500), max_size=12))
def test_the_scale_moves_as_that_of_torch(outcomes):
    ours, theirs = LossScale(), torch.amp.GradScaler("cpu")
    theirs.scale(torch.zeros(1))
    for outcome in outcomes:
        times = outcome if type(outcome) is int else 1
        for _ in range(times):
            ours = ours.after_overflow() if outcome is False else ours.after_step()
            found = torch.tensor(float(outcome is False))
            theirs._per_optimizer_states[0]["found_inf_per_device"] = {"cpu": found}
            theirs.update()
    assert ours == LossScale(value=theirs.get_scale(), good_steps=theirs._get_growth_tracker())


def test_the_scale_does_not_fall_below_one():
    scale = LossScale(value=2.0, good_steps=5).after_overflow()
    assert scale == LossScale(value=1.0)
    assert not scale.can_fall
    assert scale.after_overflow() == scale


@pytest.mark.parametrize(
    ("autocast", "device", "expected"),
    [("off", "cpu", ""), ("float16", "cpu", "float16"), ("auto", "cpu", "bfloat16")],
)
def test_each_side_chooses_by_its_device(autocast, device, expected):
    assert precision_of(ModelSpec(autocast=autocast), torch.device(device)) == expected


def test_a_part_says_in_what_precision_it_computes(caplog):
    config = dict(n_layer=3, n_embd=16, n_head=2, vocab_size=64)
    run = small_run(model=ModelSpec(autocast="auto", config=config))
    with caplog.at_level("INFO"):
        parts_of(run, config_of(run, None))
    assert "GPT2LMHeadModel on cpu computes attention as sdpa, matrix products in bf" in caplog.text


# --- against the unsplit model ------------------------------------------------------------------

CASES = {
    "plain": dict(),
    "clipped": dict(clip_norm=0.05),
    "adamw": dict(optimizer="adamw", lr=1e-3, clip_norm=0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("scale", [2.0**16, HUGE.value], ids=["from 65536", "falling"])
@pytest.mark.parametrize("train", CASES.values(), ids=CASES)
def test_split_training_is_that_of_torchs_scaler(tiny_llama, train, scale):
    run = run_with(**train)
    steps = NUM_STEPS if scale == 2.0**16 else 30
    ours, trainer, stats, sent = split_fit(
        tiny_llama(), run, scale=LossScale(value=scale), steps=steps
    )
    theirs, scaler = with_torchs_scaler(tiny_llama(), run, scale=scale, steps=steps)
    assert trainer.loss_scale.value == scaler.get_scale()
    assert (stats.skipped > 3) == (scale > 2.0**16), "more in a row than would end it without"
    assert stats.steps + stats.skipped == steps and stats.steps == len(sent)
    assert sent[-1].loss_scale == scaler.get_scale()
    assert largest_gap(weights(ours), weights(theirs)) < 1e-5
    before = weights(whole_of(tiny_llama(), run))
    assert largest_gap(weights(ours), before) > 1e-3, "it has trained"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_same_loop_unsplit_gives_the_same(tiny_gpt2, tiny_llama, family):
    config = {"gpt2": tiny_gpt2, "llama": tiny_llama}[family]()
    run = run_with(clip_norm=0.05)
    ours, trainer, stats, _ = split_fit(config, run)
    whole = whole_of(config, run)
    judge = ClientTrainer(whole, NoTrunk(whole, client="alice"), run)
    assert judge.fit(groups()).loss == pytest.approx(stats.loss, abs=1e-5)
    assert judge.loss_scale == trainer.loss_scale == LossScale(good_steps=NUM_STEPS)
    assert largest_gap(weights(ours), weights(whole)) < 1e-4


def test_a_scale_alone_changes_no_number(tiny_llama):
    """Where nothing over- or underflows, a power of two cancels out to the last bit."""
    run = run_with(model=ModelSpec(), clip_norm=0.05, trunk_steps=2, accumulation=2)
    plain = split_fit(tiny_llama(), run, link=Unscaled)[0]
    scaled, _, _, sent = split_fit(tiny_llama(), run)
    assert [step.loss_scale for step in sent] == [65536.0] * NUM_STEPS
    assert same(weights(plain), weights(scaled))


class Unscaled(Noting):
    """A link to a trunk that says it is not in float16."""

    autocast = ""


def test_clients_of_one_barrier_have_scales_of_their_own(tiny_llama):
    def trained(run, scales):
        with world(tiny_llama(), run) as here:
            members = [here.add(f"client-{i}") for i in range(len(scales))]
            for member, scale in zip(members, scales, strict=True):
                member.trainer.loss_scale = LossScale(value=scale)
            here.service.expect([*here.members], round=1, at_once=2, close_after=2)
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda each: each.trainer.fit(groups()), members))
            return here.trunk_weights()

    alike, unlike = (trained(run_with(), scales) for scales in ((512.0, 512.0), (2048.0, 64.0)))
    assert largest_gap(alike, unlike) < 1e-3


# --- what may go wrong --------------------------------------------------------------------------


class Poison(Noting):
    """A link over which every answer of the trunk comes back as NaN."""

    def exchange(self, request):
        reply = super().exchange(request)
        if isinstance(request, m.ForwardRequest):
            return replace(reply, trunk_out_BTD=reply.trunk_out_BTD * math.nan)
        return reply


def test_a_model_that_is_broken_ends_the_round_once_the_scale_is_at_its_lowest(tiny_llama):
    with world(tiny_llama(), run_with()) as here:
        alice = here.add("alice", Poison(here.service, here.service.admit("alice")))
        alice.trainer.loss_scale = LossScale(value=4.0)
        before = weights(alice.model)
        with pytest.raises(NonFinite):
            alice.trainer.fit(groups(10))
        assert alice.trunk.next_call == 4 * 2 + 1, "two steps lower the scale, three are given up"
        assert alice.trainer.loss_scale == LossScale(value=1.0)
        assert same(weights(alice.model), before)


@pytest.mark.parametrize("scale", [0.0, 0.5, -1.0, math.nan])
def test_a_scale_that_makes_gradients_larger_is_refused(tiny_llama, scale):
    with world(tiny_llama(), run_with()) as here:
        alice = here.add("alice")
        with alice.trunk.session():
            alice.model(**batch().inputs, labels=batch().labels).loss.backward()
            with pytest.raises(ProtocolError, match="loss_scale=.* must be at least 1"):
                alice.trunk.step(step=0, num_tokens=1, client_sq_norm=0.0, loss_scale=scale)


@pytest.mark.parametrize(("up", "grad"), [("fp16", "fp16"), ("int8", "int8:stochastic")])
def test_codecs_go_with_it(tiny_llama, up, grad):
    lossy = dict(up=up, down=up, grad_up=grad, grad_down=grad)
    full, *_ = split_fit(tiny_llama(), run_with(clip_norm=0.5))
    coded, trainer, stats, _ = split_fit(tiny_llama(), run_with(clip_norm=0.5, wire=lossy))
    assert (stats.skipped, trainer.loss_scale.good_steps) == (0, NUM_STEPS)
    assert 0 < largest_gap(weights(full), weights(coded)) < 0.02
