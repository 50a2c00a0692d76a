"""Loops that are not ours over a remote trunk, against the same loop on the unsplit model."""

import copy
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from fedsplit.errors import CheckpointError, ConfigError, NonFinite, ProtocolError
from fedsplit.model import join_model
from fedsplit.spec import TrainSpec
from tests.core.worlds import batch, same, small_run, world

STEPS = 4
# The Trainer's defaults, with a rate at which clipped and unclipped steps differ.
TRAIN = TrainSpec(
    lr=0.01, beta2=0.999, schedule="linear", warmup_steps=0, max_steps=STEPS, batch_size=2
)
ROWS = [
    {"input_ids": row, "labels": row}
    for seed in range(2 * STEPS)
    for row in batch(seed).labels.tolist()
]


def trainer_of(model, folder, *callbacks, **options):
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        learning_rate=TRAIN.lr,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **{"save_strategy": "no", "max_steps": STEPS, **options},
    )
    return Trainer(
        model=model, args=args, train_dataset=ROWS, eval_dataset=ROWS[:2], callbacks=[*callbacks]
    )


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights_of(here, member):
    return join_model(member.model, here.parts.trunk).state_dict()


def assert_close(found, wanted, atol=1e-6):
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=0)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_with_its_defaults_trains_as_it_trains_the_unsplit_model(
    tiny_llama, tmp_path, accumulation
):
    options = {"gradient_accumulation_steps": accumulation}
    with world(tiny_llama(), small_run(train=TRAIN)) as here:
        alice = here.add("alice")
        whole = join_model(alice.model, here.parts.trunk)
        unsplit = trainer_of(whole, tmp_path, **options)
        unsplit.train()
        split = trainer_of(alice.model, tmp_path, **options)
        with alice.trunk.follow(split.create_optimizer()):
            with alice.trunk.session():
                split.train()
            assert here.service.engine.version == STEPS
            found = weights_of(here, alice)
    norms = logged(unsplit, "grad_norm")
    assert max(norms) > 1.0, "else nothing is clipped here"
    assert logged(split, "grad_norm") == pytest.approx(norms, rel=1e-5)
    assert logged(split, "loss") == pytest.approx(logged(unsplit, "loss"), abs=1e-5)
    assert_close(found, whole.state_dict(), atol=1e-5)


def loop(model, optimizer, batches, *, clip=None, zero_first=False, scaler=None):
    """A loop as a user writes it."""
    losses = []
    for each in batches:
        if zero_first:
            optimizer.zero_grad()
        loss = model(**each.inputs, labels=each.labels).loss
        losses.append(loss.item())
        if scaler:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer) if clip else None
        else:
            loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        if not zero_first:
            optimizer.zero_grad()
    return losses


def of_both(config, train, make_optimizer, run_loop):
    """Losses and weights of a loop over a remote trunk, and of the loop on the unsplit model."""
    with world(config, small_run(train=train)) as here:
        alice = here.add("alice")
        whole = join_model(alice.model, here.parts.trunk)
        optimizer = make_optimizer(alice.model.parameters())
        with alice.trunk.session(), alice.trunk.follow(optimizer):
            found = run_loop(alice.model, optimizer)
        weights = weights_of(here, alice)
        assert here.service.engine.stashed_bytes == 0
    wanted = run_loop(whole, make_optimizer(whole.parameters()))
    assert found == pytest.approx(wanted, abs=1e-6)
    assert_close(weights, whole.state_dict())
    return here.service.engine.version


SGD = replace(small_run().train, lr=0.1)
BATCHES = [batch(i) for i in range(3)]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def test_clipping_in_a_loop_is_by_the_norm_of_all_three_parts(tiny_llama):
    of_both(tiny_llama(), SGD, sgd, lambda *on: loop(*on, BATCHES, clip=0.05))


def test_the_runs_clipping_applies_to_both_sides_of_a_loop_without(tiny_llama):
    train = replace(SGD, clip_norm=0.05)

    def clipped(model, optimizer):
        is_unsplit = not hasattr(model, "remote")
        return loop(model, optimizer, BATCHES, clip=0.05 if is_unsplit else None, zero_first=True)

    of_both(tiny_llama(), train, sgd, clipped)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_loss_scaler_scales_the_trunk_s_gradients_too(tiny_llama, fused, clip):
    # The first scale overflows: float32 has no 2e39.
    def run_loop(model, optimizer):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-100)
        losses = loop(model, optimizer, [BATCHES[0], *BATCHES], clip=clip, scaler=scaler)
        assert scaler.get_scale() == 2.0**27, "one step was skipped"
        return losses

    steps = of_both(tiny_llama(), SGD, lambda p: torch.optim.SGD(p, lr=0.1, fused=fused), run_loop)
    assert steps == 3


def test_gradients_that_a_loop_drops_are_dropped_at_the_trunk(tiny_llama):
    def run_loop(model, optimizer):
        model(**batch(9).inputs, labels=batch(9).labels).loss.backward()
        optimizer.zero_grad(set_to_none=False)
        return loop(model, optimizer, BATCHES, zero_first=True)

    of_both(tiny_llama(), SGD, sgd, run_loop)


def drop_late(model, optimizer):
    model(**batch(9).inputs, labels=batch(9).labels).loss.backward()
    loss = model(**batch().inputs, labels=batch().labels).loss
    optimizer.zero_grad()
    loss.backward()


def clip_by_value(model, optimizer):
    model(**batch().inputs, labels=batch().labels).loss.backward()
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    optimizer.step()


def clip_each(model, optimizer):
    for _ in range(2):
        model(**batch().inputs, labels=batch().labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def multiply(model, optimizer):
    model(**batch().inputs, labels=batch().labels).loss.backward()
    torch._foreach_mul_([p.grad for p in model.parameters()], 2.0)
    optimizer.step()


def diverge(model, optimizer):
    (model(**batch().inputs, labels=batch().labels).loss * float("nan")).backward()
    optimizer.step()


def drop_never(model, optimizer):
    # The rate is too small for the first step to change a weight.
    for _ in range(2):
        model(**batch().inputs, labels=batch().labels).loss.backward()
        optimizer.step()


def step_first(model, optimizer):
    optimizer.step()  # does nothing, as without a trunk
    model.lm_head(torch.zeros(16)).sum().backward()
    optimizer.step()


REFUSALS = {
    "no zero_grad": (drop_never, ConfigError, "call zero_grad before the next backward"),
    "no backward": (step_first, ConfigError, "without a backward through the trunk"),
    "zero_grad before backward": (drop_late, ConfigError, "call zero_grad before the forward"),
    "by value": (clip_by_value, ConfigError, "clip them with clip_grad_norm_"),
    "of each backward": (clip_each, ConfigError, "once, after the last backward"),
    "a factor above 1": (multiply, ConfigError, "multiplied by 2 after the backward"),
    "nan": (diverge, NonFinite, "gradients of step 0 hold NaN or Inf"),
    "a closure": (lambda _, optimizer: optimizer.step(lambda: 0.0), ConfigError, "has a closure"),
}


@pytest.mark.parametrize(("code", "error", "text"), REFUSALS.values(), ids=REFUSALS)
def test_what_the_trunk_cannot_follow_is_refused_before_a_weight_changes(
    tiny_llama, code, error, text
):
    with world(tiny_llama(), small_run(train=replace(SGD, lr=1e-30))) as here:
        alice = here.add("alice")
        before = copy.deepcopy(weights_of(here, alice))
        optimizer = torch.optim.SGD(alice.model.parameters(), lr=1e-30)
        alice.trunk.open()
        with alice.trunk.follow(optimizer), pytest.raises(error, match=text):
            code(alice.model, optimizer)
        assert same(weights_of(here, alice), before)


def test_a_copy_of_a_followed_model_has_its_weights_and_no_trunk(tiny_llama):
    with world(tiny_llama(), small_run(train=SGD)) as here:
        alice = here.add("alice")
        optimizer = sgd(alice.model.parameters())
        with alice.trunk.session(), alice.trunk.follow(optimizer):
            loop(alice.model, optimizer, BATCHES[:1])
            average = torch.optim.swa_utils.AveragedModel(alice.model)
            average.update_parameters(alice.model)
            assert same(average.module.state_dict(), alice.model.state_dict())
            with pytest.raises(ConfigError, match="a copy of a client has no trunk"):
                average(**batch().inputs)


def test_follow_leaves_no_trace_and_is_refused_where_the_trunk_does_not_train(tiny_llama):
    with world(tiny_llama(), small_run()) as here:
        alice = here.add("alice")
        names = [name for name, _ in alice.model.named_parameters()]
        optimizer = sgd(alice.model.parameters())
        with pytest.raises(ProtocolError, match=r"no session is open; use `with trunk.session"):
            alice.model(**batch().inputs)
        # A Trainer has none before it trains.
        with pytest.raises(ConfigError, match=r"not NoneType; .* trainer.create_optimizer\(\)"):
            alice.trunk.follow(None)
        followed = alice.trunk.follow(optimizer)
        assert alice.model.state_dict().keys() == {*names, "trunk_version"}
        with pytest.raises(ConfigError, match="the trunk follows an optimizer already"):
            alice.trunk.follow(optimizer)
        followed.remove()
        assert [name for name, _ in alice.model.named_parameters()] == names
        assert alice.model.state_dict().keys() == set(names)
        assert len(optimizer.param_groups[0]["params"]) == len(names)
    frozen = small_run(train=replace(small_run().train, mode="frozen_trunk"))
    with world(tiny_llama(), frozen) as here:
        alice = here.add("alice")
        with pytest.raises(ConfigError, match="train.mode=frozen_trunk: the trunk does not train"):
            alice.trunk.follow(sgd(alice.model.parameters()))


class Stop(TrainerCallback):
    """Stops a training after a step, as a crash would, and keeps the trunk's state of that time."""

    def __init__(self, at):
        self.at = at

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= state.global_step == self.at


def resumed(config, folder, wrap):
    """Weights after four steps, of which the last two are taken by another process, so to say."""
    saves = {"save_strategy": "steps", "save_steps": 2}
    with world(config, small_run(train=TRAIN)) as here:
        alice = here.add("alice")
        trainer = trainer_of(wrap(alice.model), folder, Stop(2), **saves)
        with alice.trunk.session(), alice.trunk.follow(trainer.create_optimizer()):
            trainer.train()
        state = here.service.engine.state()
    with world(config, small_run(train=TRAIN)) as here:
        alice = here.add("alice")
        trainer = trainer_of(wrap(alice.model), folder, **saves)
        optimizer = trainer.create_optimizer()
        with alice.trunk.session(), alice.trunk.follow(optimizer, step=2) as followed:
            with pytest.raises(
                CheckpointError, match="version 2 of the trunk, which is at version 0"
            ):
                trainer.train(resume_from_checkpoint=True)
        here.service.engine.load_state(state)
        with alice.trunk.session(), alice.trunk.follow(optimizer) as followed:
            trainer.train(resume_from_checkpoint=True)
            assert followed.steps == STEPS
        assert here.service.engine.version == STEPS
        return weights_of(here, alice)


def test_the_trainer_resumes_from_its_checkpoint_where_the_trunk_is_of_its_version(
    tiny_llama, tmp_path
):
    with world(tiny_llama(), small_run(train=TRAIN)) as here:
        alice = here.add("alice")
        trainer = trainer_of(alice.model, tmp_path / "at once")
        with alice.trunk.session(), alice.trunk.follow(trainer.create_optimizer()):
            trainer.train()
        wanted = weights_of(here, alice)
    assert same(resumed(tiny_llama(), tmp_path / "twice", lambda model: model), wanted)


def test_earlier_weights_are_not_loaded_beside_the_present_trunk(tiny_llama, tmp_path):
    with world(tiny_llama(), small_run(train=TRAIN)) as here:
        alice = here.add("alice")
        # A rate of this size makes the loss rise, so the best model is not the last.
        trainer = trainer_of(
            alice.model,
            tmp_path,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            greater_is_better=True,
            metric_for_best_model="loss",
        )
        with alice.trunk.session(), alice.trunk.follow(trainer.create_optimizer()):
            with pytest.raises(CheckpointError, match=r"version 1 of the trunk, .* at version 4"):
                trainer.train()
            wanted = copy.deepcopy(alice.model.state_dict())
            wanted.pop("trunk_version")
            with pytest.raises(CheckpointError, match="do not say with which version"):
                alice.model.load_state_dict(wanted)
            alice.model.load_state_dict(alice.model.state_dict())


def test_a_copy_tells_the_version_of_the_trunk_that_its_weights_belong_to(tiny_llama, tmp_path):
    with world(tiny_llama(), small_run(train=SGD)) as here:
        alice = here.add("alice")
        optimizer = sgd(alice.model.parameters())
        with alice.trunk.session(), alice.trunk.follow(optimizer):
            loop(alice.model, optimizer, BATCHES[:1])
            copied = copy.deepcopy(alice.model)
            loop(alice.model, optimizer, BATCHES[1:])
            copied.save_pretrained(tmp_path)
            saved = load_file(tmp_path / "part.safetensors")
            assert saved["trunk_version"].tolist() == [1, 1]
            with pytest.raises(CheckpointError, match=r"version 1 of the trunk, .* at version 3"):
                alice.model.load_state_dict(copied.state_dict())
            copied.load_state_dict(alice.model.state_dict())
        restored = pickle.loads(pickle.dumps(copied))
    for model in (copied, restored):
        assert model.state_dict()["trunk_version"].tolist() == [3, 3]


def test_peft_trains_its_adapters_at_the_client_through_follow(tiny_llama, tmp_path):
    with world(tiny_llama(), small_run(train=replace(TRAIN, clip_norm=0.0))) as here:
        alice = here.add("alice")
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            adapted = get_peft_model(alice.model, LoraConfig(r=2, target_modules=["q_proj"]))
        trainer = trainer_of(adapted, tmp_path, save_strategy="steps", save_steps=4)
        before = here.trunk_weights()
        # peft asks for the vocabulary of the model's source, and this model has no source.
        unknown = warnings.catch_warnings(action="ignore", category=UserWarning)
        with unknown, alice.trunk.session(), alice.trunk.follow(trainer.create_optimizer()):
            trainer.train()
            with pytest.raises(CheckpointError, match="do not say with which version"):
                trainer._load_from_checkpoint(str(tmp_path / "checkpoint-4"))
        assert not same(here.trunk_weights(), before)


def test_a_followed_model_is_not_pickled(tiny_llama):
    with world(tiny_llama(), small_run()) as here:
        alice = here.add("alice")
        with alice.trunk.session(), alice.trunk.follow(sgd(alice.model.parameters())):
            with pytest.raises(ConfigError, match="cannot be pickled meanwhile; save its"):
                pickle.dumps(alice.model)
        pickle.dumps(alice.model)


# --- a trunk that nothing steps --------------------------------------------------------------

WARNING = "the trunk was not asked for a step, so it does not train"


@pytest.mark.parametrize("zero_first", [False, True])
def test_a_trunk_that_nothing_steps_is_reported_once(tiny_llama, caplog, zero_first):
    with world(tiny_llama(), small_run()) as here:
        alice = here.add("alice")
        optimizer = torch.optim.AdamW(alice.model.parameters(), fused=True)
        for _ in range(2):
            with alice.trunk.session():
                loop(alice.model, optimizer, BATCHES, zero_first=zero_first)
    assert [WARNING in text for text in caplog.messages] == [True]


def test_one_step_that_the_trunk_does_not_take_is_reported_at_the_end(tiny_llama, caplog):
    with world(tiny_llama(), small_run()) as here:
        alice = here.add("alice")
        with alice.trunk.session():
            loop(alice.model, sgd(alice.model.parameters()), BATCHES[:1])
    assert [WARNING in text for text in caplog.messages] == [True]


@pytest.mark.parametrize("mode", ["joint", "frozen_trunk"])
def test_our_own_trainer_gives_no_warning(tiny_llama, caplog, mode):
    run = small_run(train=replace(small_run().train, mode=mode))
    with world(tiny_llama(), run) as here:
        alice = here.add("alice")
        for _ in range(2):
            alice.trainer.fit([BATCHES, BATCHES])
            alice.trainer.evaluate(BATCHES)
    assert caplog.messages == []


def test_an_optimizer_that_is_not_the_trunk_s_is_reported(tiny_llama, caplog):
    with world(tiny_llama(), small_run()) as here, here.add("alice").trunk.session():
        trunk = here.members["alice"].trunk
        weights = [*here.members["alice"].model.parameters()]
        trunk.follow(torch.optim.SGD(weights, lr=0.1)).remove()
        assert caplog.messages == []
        trunk.follow(torch.optim.AdamW(weights, lr=0.1)).remove()
        trunk.follow(torch.optim.SGD(weights, lr=0.2)).remove()
    assert [text[:36] for text in caplog.messages] == [
        "the client steps with AdamW at lr=0.",
        "the client steps with SGD at lr=0.2,",
    ]
