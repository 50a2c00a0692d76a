"""A run that was interrupted goes on from its checkpoints, to the very same numbers."""

import json
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fedsplit.config import compose
from fedsplit.errors import CheckpointError, ConfigError
from fedsplit.runs.checkpoint import checkpoints_in, facts_of, states_in
from fedsplit.runs.folder import RunFolder
from tests.core.extras import needs_bitsandbytes
from tests.edge.federation import (
    SGD,
    federate,
    joined,
    overrides_for,
    spec_for,
    without_seconds,
)
from tests.edge.forked import Program
from tests.edge.resuming import folder_of, interrupted, resumed

KEPT = ("train.rounds=4", "train.local_steps=2", "train.save_every=1")
SHORT = ("train.rounds=3", "train.local_steps=2", "train.save_every=1", "train.evaluate_every=3")


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A run that broke off in its third round."""
    run = spec_for(tmp_path_factory.mktemp("broken"), *KEPT)
    interrupted(run, 3)
    return run


@pytest.fixture(scope="module")
def whole(broken):
    """The same run without a break."""
    launch = replace(broken.launch, run_dir=f"{broken.launch.run_dir}-whole")
    return federate(replace(broken, launch=launch))


@pytest.fixture
def run(broken, tmp_path):
    """A copy of it, for a test that goes on from there or changes what is there."""
    runs = tmp_path / "runs"
    shutil.copytree(broken.launch.run_dir, runs)
    return replace(broken, launch=replace(broken.launch, run_dir=str(runs)))


VARIANTS = {
    "full": (),
    "personal-lora-dropout": (
        "client_weights=personal_bottom",
        "lora=on",
        "lora.rank=2",
        "lora.dropout=0.5",
    ),
    "fedadam-sampled": (
        "client_weights.strategy=flwr.serverapp.strategy.FedAdam",
        "client_weights.options={fraction_train: 0.5}",
    ),
    "done-sampled": ("train.max_steps=2", "client_weights.options={fraction_train: 0.5}"),
    "strong": ("wire=strong", "train.accumulation=2"),
    "float16": ("model.autocast=float16",),
    "v1": ("strategy=splitfed_v1", "wire.client_weights=int8"),
    "sequential": ("strategy=sequential",),
    "quantized": ("lora=on", "model.quantize=nf4", "model.quantize_client=int8"),
}
NOT_IN_STEP = {
    "async": ("policy=async", "policy.sim_slowdown={client-2: 3}"),
    "fedbuff": (
        "policy=async",
        "policy.buffer=2",
        "policy.sim_slowdown={client-2: 3}",
        "wire.client_weights=fp16",
    ),
    "quorum": ("policy=quorum", "policy.sim_slowdown={client-2: 3}", "policy.quorum=2"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=name, marks=needs_bitsandbytes if name == "quantized" else ())
        for name, words in VARIANTS.items()
    ],
)
def test_going_on_gives_the_numbers_of_not_stopping(tmp_path, words):
    whole = federate(spec_for(tmp_path / "whole", *SHORT, *words))
    run = spec_for(
        tmp_path / "whole", *SHORT, *words, f"launch.run_dir={tmp_path / 'cut' / 'runs'}"
    )
    interrupted(run, 3)
    folder = resumed(run)
    assert folder.path == Path(run.launch.run_dir) / run.name
    assert without_seconds(folder.rounds()) == without_seconds(whole.rounds())
    went_on = joined(folder)
    for name, tensor in joined(whole).items():
        assert tensor.equal(went_on[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("words", NOT_IN_STEP.values(), ids=NOT_IN_STEP)
def test_a_run_that_does_not_wait_loses_the_work_in_progress_and_learns_as_well(tmp_path, words):
    whole = federate(spec_for(tmp_path / "whole", *SHORT, *words, "train.rounds=6"))
    run = spec_for(
        tmp_path / "whole",
        *SHORT,
        *words,
        "train.rounds=6",
        f"launch.run_dir={tmp_path / 'cut' / 'runs'}",
    )
    interrupted(run, 3)
    rounds = resumed(run).rounds()
    assert [stats.round for stats in rounds] == [1, 2, 3, 4, 5, 6]
    assert sum(stats.failed for stats in rounds) == 0
    assert rounds[-1].eval_loss == pytest.approx(whole.rounds()[-1].eval_loss, rel=0.05)


@pytest.mark.slow
def test_a_trunk_that_starts_anew_is_given_the_history_it_had(tmp_path):
    words = (*KEPT, "train.local_steps=8", "wire=strong", "wire.history_bytes=1000000")
    whole = federate(spec_for(tmp_path / "whole", *words))
    run = spec_for(tmp_path / "whole", *words, f"launch.run_dir={tmp_path / 'cut' / 'runs'}")
    interrupted(run, 3)
    folder = resumed(run)
    for wanted, got in zip(whole.rounds(), folder.rounds(), strict=True):
        more = got.bytes_up - wanted.bytes_up
        assert more > 0 if got.round >= 3 else more == 0  # by then the first epoch is over
        # It asks for what it has lost.
        alike = {"seconds": 0, "bytes_up": 0, "bytes_down": 0, "by_client": {}}
        assert replace(got, **alike) == replace(wanted, **alike)
    went_on = joined(folder)
    assert all(tensor.equal(went_on[name]) for name, tensor in joined(whole).items())


def test_the_loss_scale_goes_on_too(tmp_path):
    run = spec_for(tmp_path, *KEPT, "model.autocast=float16")
    interrupted(run, 3)
    folder = resumed(run)
    *_, last = states_in(folder.path / "clients" / "client-1" / folder.id).values()
    assert facts_of(last, ("moments", "personal", "history"))["good_steps"] == 4 * 2


def test_a_snapshot_that_was_not_finished_is_not_used(run):
    latest = checkpoints_in(folder_of(run).checkpoints)[2]
    (latest / "checkpoint.json").unlink()
    assert [stats.round for stats in resumed(run).rounds()] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    "damaged",
    [
        "checkpoints/round-0002/trunk.safetensors",
        "checkpoints/round-0002/checkpoint.json",
        "clients/client-1/*/round-0002-*/moments.safetensors",
        "clients/client-1/*/round-0002-*/checkpoint.json",
    ],
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(run, whole, damaged, caplog):
    (file,) = folder_of(run).path.glob(damaged)
    file.write_bytes(file.read_bytes()[:-1])
    folder = resumed(run)
    assert str(file.parent) in caplog.text
    assert ("not used: the state of client-1 for it is" in caplog.text) == ("clients" in damaged)
    assert without_seconds(folder.rounds()) == without_seconds(whole.rounds())
    weights = joined(whole)
    assert all(tensor.equal(weights[name]) for name, tensor in joined(folder).items())


def test_a_run_without_an_intact_checkpoint_is_refused(run):
    for file in folder_of(run).checkpoints.glob("*/trunk.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        resumed(run)


def test_states_that_a_client_has_lost_are_named_for_each_round(run, caplog):
    for folder in folder_of(run).path.glob("clients/client-1/*/round-*"):
        (folder / "moments.safetensors").write_bytes(b"")
    text = r"client-1 cannot continue from any checkpoint of the server \(rounds 1, 2\)"
    with pytest.raises(CheckpointError, match=text):
        resumed(run)
    assert caplog.text.count("the state of client-1 for it is missing or damaged") == 2


@pytest.mark.parametrize(
    ("label", "edit"),
    [
        ("checkpoints", ('"round": 2', '"round": 1')),
        ("clients/client-1/*", ('"batches": 4', '"batches": 5')),
    ],
    ids=["round", "batches"],
)
def test_a_flipped_bit_in_a_label_does_not_change_where_a_run_continues(
    run, whole, label, edit, caplog
):
    (path,) = folder_of(run).path.glob(f"{label}/round-0002*/checkpoint.json")
    text = path.read_text()
    assert text.count(edit[0]) == 1
    path.write_text(text.replace(*edit))
    folder = resumed(run)
    assert "checkpoint.json is damaged or edited" in caplog.text
    assert without_seconds(folder.rounds()) == without_seconds(whole.rounds())


def test_the_checkpoint_of_another_client_is_refused(run, caplog):
    first, second = sorted(folder_of(run).path.glob("clients/client-*/*"))[:2]
    shutil.rmtree(second)
    shutil.copytree(first, second)
    with pytest.raises(CheckpointError, match="client-1 cannot continue from any checkpoint"):
        resumed(run)
    assert re.search(r"round-0002-\w+ holds round 2 of client-0/.* of client-1/", caplog.text)


def test_a_client_without_its_state_is_refused_by_name(run):
    shutil.rmtree(folder_of(run).path / "clients" / "client-1")
    with pytest.raises(CheckpointError, match=r"client-1 cannot continue .* state-dir"):
        resumed(run)


@pytest.mark.parametrize("resume", ["auto", "path"])
def test_other_settings_are_refused_by_name(run, resume):
    other = replace(run, train=replace(run.train, lr=0.5))
    with pytest.raises(ConfigError, match=r"train.lr was 0.003, is 0.5; resume with the same"):
        resumed(other, "auto" if resume == "auto" else str(folder_of(run).path))


def test_a_run_that_is_still_trained_is_not_resumed(run):
    folder = folder_of(run)
    with folder.held(), pytest.raises(ConfigError, match="tiny is still trained by another proc"):
        resumed(run)
    assert [stats.round for stats in folder.rounds()] == [1, 2]
    assert [stats.round for stats in resumed(run).rounds()] == [1, 2, 3, 4]


def test_other_data_is_refused(tmp_path):
    run = spec_for(tmp_path, *KEPT)
    interrupted(run, 3)
    with Path(run.data.path).open("a") as file:
        file.write("\none more line\n")
    with pytest.raises(ConfigError, match="resume with the same data"):
        resumed(run)


def test_auto_begins_anew_where_there_is_nothing(tmp_path):
    run = spec_for(tmp_path, *KEPT, "train.rounds=2")
    assert len(resumed(run).rounds()) == 2
    other = resumed(replace(run, train=replace(run.train, rounds=1)))
    assert other.path.name == f"{run.name}-2"


def test_auto_does_not_train_again_what_is_finished(tmp_path):
    run = spec_for(tmp_path, *KEPT, "train.rounds=1")
    folder = federate(run)
    written = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    assert resumed(run).path == folder.path
    words = [*overrides_for(tmp_path, *KEPT), "train.rounds=1", "resume=auto"]
    code, told, errors = Program("simulations.run", *words).end()
    assert (code, errors) == (0, "")
    assert f"{folder.path} is finished already; leave resume out to train again" in told
    assert folder.closing_table().splitlines()[-1] in told
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == written
    assert [each.name for each in folder.path.parent.iterdir()] == [run.name]
    other = replace(run, train=replace(run.train, lr=0.02))
    assert resumed(other).path.name == f"{run.name}-2"


def test_a_folder_that_cannot_be_resumed_is_refused(tmp_path):
    run = spec_for(tmp_path, *KEPT, "train.rounds=1")
    with pytest.raises(ConfigError, match=r"nowhere has no checkpoint, so it cannot be"):
        resumed(run, str(tmp_path / "nowhere"))
    done = federate(run)
    with pytest.raises(ConfigError, match="is finished"):
        resumed(run, str(done.path))


def test_the_best_round_is_what_is_left(tmp_path):
    # Server steps this large make the later rounds worse.
    adam = (
        "client_weights.strategy=flwr.serverapp.strategy.FedAdam",
        "client_weights.options={eta: 0.3}",
    )
    words = [*SGD, *adam, "train.rounds=3", "train.local_steps=3", "name=best"]
    best = federate(spec_for(tmp_path, *words, "train.load_best=true"))
    losses = [stats.eval_loss for stats in best.rounds()]
    number = losses.index(min(losses)) + 1
    assert number < 3, f"the rounds got better and better: {losses}"
    short = federate(spec_for(tmp_path, *words, f"train.rounds={number}", "name=short"))
    kept = joined(best)
    for name, tensor in joined(short).items():
        assert tensor.equal(kept[name]), name
    assert not best.best.exists()


@pytest.mark.slow
def test_a_killed_process_goes_on(tmp_path):
    words = [*overrides_for(tmp_path / "a", *KEPT), "train.schedule=constant"]
    one = federate(compose(words))
    runs = tmp_path / "b" / "runs"
    killed = ["simulations.run", *words, f"launch.run_dir={runs}"]
    metrics = runs / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    with Program(*killed) as process:
        while not (runs / "tiny/checkpoints/round-0000").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not (runs / "tiny" / "model").exists(), "it was done before it could be killed"
    code, told, _ = Program(*killed, "resume=auto").end()
    assert code == 0 and "resumes after round" in told
    other = RunFolder(runs / "tiny")
    assert without_seconds(one.rounds()) == without_seconds(other.rounds())
    assert [json.loads(line)["round"] for line in metrics.read_text().splitlines()] == [1, 2, 3, 4]
    went_on = joined(other)
    for name, tensor in joined(one).items():
        assert tensor.equal(went_on[name]), name
