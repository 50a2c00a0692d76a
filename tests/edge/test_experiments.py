"""The experiments at toy size: what they run, what they leave, and what they go on from."""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedsplit.config import compose
from fedsplit.model import model_class_for
from fedsplit.model.describe import config_of
from fedsplit.model.lora import trainable
from fedsplit.optimization import PartOptimizer
from fedsplit.runs.compare import Group, Run
from fedsplit.spec import PolicySpec, RunSpec, ShardingSpec
from fedsplit.telemetry.round import RoundStats
from simulations.experiments import convergence, noniid, straggler
from simulations.memory import computed
from simulations.run import main
from tests.core.extras import needs_bitsandbytes
from tests.edge.federation import write_corpus
from tests.edge.rounds import round_stats

Call = Callable[..., str]


def toy(folder: Path, *overrides: str) -> list[str]:
    """What makes an experiment small."""
    return [
        "data=text",
        f"data.path={write_corpus(folder)}",
        "data.sequence_length=16",
        "data.vocabulary=300",
        "model.config.n_embd=16",
        "model.config.n_head=2",
        "train.rounds=2",
        "train.local_steps=2",
        "train.batch_size=2",
        "sweep.seeds=[0]",
        f"launch.run_dir={folder / 'runs'}",
        *overrides,
    ]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`python -m simulations.run` in this process; what it prints. Its runs have their own."""

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["run", *words])
        main()
        return capsys.readouterr().out

    return run


def table_in(folder: Path) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    told = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    return told["figures"], {row["name"]: row for row in told["rows"]}


# --- what is run ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_experiment_trains_every_variant_and_goes_on_where_it_stopped(
    tmp_path: Path, call: Call
) -> None:
    words = ["-m", "experiment=convergence", *toy(tmp_path, "clients=2")]
    words += ["sweep.variants.sequence='clients=1 train.local_steps=4'"]
    stdout = call(*words)
    folder = tmp_path / "runs" / "convergence"
    runs = {"split-seed0", "central-seed0", "sequence-seed0", "no_trunk-seed0"}
    assert {path.name for path in folder.iterdir()} == runs | {
        "table.json",
        "compare.png",
        "report.html",
    }
    figures, rows = table_in(folder)
    assert rows["split"]["tokens"] == rows["central"]["tokens"]
    assert figures == {
        f"loss_ratio_to_{name}": pytest.approx(rows["split"]["loss"] / rows[name]["loss"])
        for name in ("central", "sequence", "no_trunk")
    }
    assert re.search(r"\nloss_ratio_to_central +\d(\.\d+)?\n", stdout)
    # Again: what is there is not trained again, and what is not finished is.
    shutil.rmtree(folder / "split-seed0" / "model")
    assert "3 of 4 runs are there already" in call(*words[1:])
    assert {path.name for path in folder.iterdir()} == runs | {
        "table.json",
        "compare.png",
        "report.html",
        "split-seed0-2",
    }
    assert table_in(folder)[0] == figures


@pytest.mark.slow
def test_a_variant_that_fails_says_so_and_the_others_go_on(
    tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["experiment=convergence", *toy(tmp_path, "clients=2", "name=broken")]
    words += ["sweep.variants={lost: 'wire.tls_ca=/nowhere/ca.pem', sequence: 'clients=1'}"]
    with pytest.raises(SystemExit, match="^1$"):
        call(*words)
    stdout, stderr = capsys.readouterr()
    assert stderr.endswith("error: variants with a run that failed: lost\n")
    assert "lost-seed0 failed: " in stdout and "wire.tls_ca=/nowhere/ca.pem cannot be" in stdout
    assert "\nlost is left out, because lost-seed0 failed" in stdout
    figures, rows = table_in(tmp_path / "runs" / "broken")
    assert set(rows) == {"split", "central", "sequence", "no_trunk"} and len(figures) == 3


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("sweep.seeds=[]", "sweep.variants and sweep.seeds go together"),
        ("sweep.variants.split='train.lr=no'", "sweep.variants.split (train.lr=no): train.lr='no'"),
        ("sweep.variants.split='seed=\"1'", 'sweep.variants.split (seed="1): No closing quotation'),
        (
            "train.lr=0.1,0.2",
            "convergence is a sweep of its own (split, central, sequence, no_trunk)",
        ),
    ],
    ids=["no seeds", "a value", "quotes", "a sweep of a sweep"],
)
def test_what_cannot_be_swept_is_refused_before_anything_runs(
    word: str, said: str, tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="^1$"):
        call("-m", "experiment=convergence", *toy(tmp_path), word)
    assert f"error: {said}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_setting_that_a_variant_cannot_take_is_refused_with_the_way_out(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = (
        "error: sweep.variants.local_loss-dirichlet (sharding=dirichlet strategy=local_loss): "
        "policy.sim_slowdown goes by the trunk's steps"
    )
    with pytest.raises(SystemExit, match="^1$"):
        call("experiment=noniid", "policy=async", "policy.sim_slowdown={client-0: 2.0}")
    told = capsys.readouterr().err
    assert refused in told
    assert told.endswith(
        "Every variant takes what the command line sets; for what only some can take, add a "
        "variant: 'sweep.variants.NAME=\"field=value\"'\n"
    )


# --- what is asked of the runs --------------------------------------------------------------------


def group(name: str, spec: RunSpec, *rounds: list[RoundStats]) -> Group:
    """A run for each seed, with these rounds."""
    runs = [
        Run(path=Path(f"{name}-seed{seed}"), spec=replace(spec, seed=seed), rounds=one)
        for seed, one in enumerate(rounds)
    ]
    return Group(name=name, runs=runs)


def timed(loss: float, seconds: float, steps: int) -> RoundStats:
    return round_stats(1, loss, virtual_seconds=seconds, steps=steps)


def test_convergence_compares_means_over_seeds() -> None:
    run, other = RunSpec(), RunSpec(baseline="central")
    groups = [
        group("split", run, [round_stats(1, 9.0), round_stats(2, 2.0)], [round_stats(1, 1.0)]),
        group("central", other, [round_stats(1, 3.0)], [round_stats(1, 1.0)]),
    ]
    assert convergence.table(groups).figures == {"loss_ratio_to_central": 0.75}


def test_straggling_is_told_in_virtual_time() -> None:
    slow = RunSpec(clients=5, policy=PolicySpec(sim_slowdown={"client-4": 10}))
    even = RunSpec(clients=5, policy=PolicySpec(sim_slowdown={"client-4": 1}))
    groups = [
        group("sync", slow, [timed(3.0, 100, 50), timed(2.0, 100, 50)]),
        # Of 41 steps in 10 seconds the slow client took one, the others one a second.
        group("async", slow, [timed(3.0, 10, 41), timed(2.1, 20, 82), timed(1.9, 20, 82)]),
        # Until its last round the others took 36 steps in 10 seconds here.
        group("quorum", slow, [timed(3.0, 10, 37), timed(2.5, 90, 37)]),
        group("even", even, [timed(2.0, 10, 50)]),
    ]
    table = straggler.table(groups)
    assert table.figures["time_ratio_async"] == 50 / 200
    assert math.isnan(table.figures["time_ratio_quorum"])  # it never gets there
    assert table.figures["others_speed"] == pytest.approx(0.9)
    assert [row["others_steps_per_second"] for row in table.rows[:2]] == pytest.approx([0.1, 1.0])


def test_methods_are_compared_with_fedavg_on_the_same_sharding() -> None:
    natural, skewed = ShardingSpec(kind="natural"), ShardingSpec(kind="dirichlet")
    groups = [
        group("v2-sync-natural", RunSpec(sharding=natural), [round_stats(1, 2.0)]),
        group("v2-sync-dirichlet", RunSpec(sharding=skewed), [round_stats(1, 2.0)]),
        group(
            "fedavg-natural", RunSpec(sharding=natural, baseline="fedavg"), [round_stats(1, 1.6)]
        ),
        group(
            "fedavg-dirichlet", RunSpec(sharding=skewed, baseline="fedavg"), [round_stats(1, 2.5)]
        ),
    ]
    table = noniid.table(groups)
    assert table.figures == {
        "loss_ratio_to_fedavg_natural": 1.25,
        "loss_ratio_to_fedavg_dirichlet": 0.8,
    }
    said = [line.split("MiB")[-1].strip() for line in str(table).splitlines()]
    assert said[1:3] == ["+25.0% loses", "-20.0% wins"]


def test_a_difference_within_the_spread_is_none() -> None:
    groups = [
        group("v2-sync", RunSpec(), [round_stats(1, 2.0)], [round_stats(1, 2.2)]),
        group("fedavg", RunSpec(baseline="fedavg"), [round_stats(1, 1.9)], [round_stats(1, 2.2)]),
    ]
    assert "+2.4% equal" in str(noniid.table(groups))


# --- memory ---------------------------------------------------------------------------------------

SHAPE = [
    "model.config={n_layer: 6, n_embd: 32, n_head: 2, n_positions: 32, vocab_size: 100}",
    "data.sequence_length=16",
    "train.batch_size=3",
]


def test_weights_gradients_and_moments_are_exact() -> None:
    block, rest = 12 * 32 * 32 + 13 * 32, 100 * 32 + 32 * 32 + 2 * 32
    for part, blocks in (("client", 2), ("whole", 6)):
        told = computed(compose(SHAPE), part=part)
        size = 4 * (blocks * block + rest)
        assert (told["weights"], told["gradients"], told["moments"]) == (size, size, 2 * size)
        assert told["trained"] == size // 4
        # The gradients come while the activations go.
        kept = told["weights"] + told["moments"]
        assert kept + max(told["gradients"], told["activations"]) <= told["peak"]


@pytest.mark.parametrize(
    "optimizer",
    [
        "sgd",
        "sgd train.momentum=0.9",
        "adam",
        "adamw",
        pytest.param("adamw_8bit", marks=needs_bitsandbytes),
        pytest.param("paged_adamw_8bit", marks=needs_bitsandbytes),
    ],
)
def test_moments_are_those_that_the_optimizer_has(optimizer: str) -> None:
    run = compose([*SHAPE, *f"train.optimizer={optimizer}".split()])
    config = config_of(run, None)
    model: nn.Module = model_class_for(config)(config)
    made = PartOptimizer(trainable(model), run.train)
    for parameter in made.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    made.step(0)
    moments = {key: value for key, value in made.state().items() if "|qmap" not in key}  # tables
    counted = sum(value.nbytes for key, value in moments.items() if not key.endswith("|step"))
    told = computed(run, part="whole")
    assert told["moments"] == counted
    assert told["activations"] == computed(compose(SHAPE), part="whole")["activations"]


def test_adapters_leave_the_weights_and_train_little() -> None:
    full, lora = (computed(compose([*SHAPE, *more]), part="client") for more in ([], ["lora=on"]))
    adapters = 2 * 8 * (32 + 3 * 32)  # of rank 8, on the attention of two blocks
    assert lora["trained"] == adapters
    assert lora["weights"] == full["weights"] + 4 * adapters
    assert lora["moments"] == 8 * adapters


def test_activations_grow_with_the_batch_and_with_blocks() -> None:
    one = computed(compose(SHAPE), part="client")["activations"]
    two = computed(compose([*SHAPE, "train.batch_size=6"]), part="client")["activations"]
    assert 1.8 * one < two < 2.2 * one
    assert computed(compose(SHAPE), part="whole")["activations"] > 1.5 * one


@pytest.mark.slow
def test_memory_is_told_of_a_client_and_of_the_whole(tmp_path: Path, call: Call) -> None:
    """The large shapes take no memory; the small one is really trained, in processes of its own."""
    small = "model.config.n_embd=64 train.batch_size=2 data.sequence_length=64"
    shapes = {
        "gpt2": small,
        "gpt2_lora": f"{small} lora=on",
        "7b_lora": "model=llama_7b lora=on model.config.num_hidden_layers=8",
    }
    variants = ", ".join(f"{name}: '{words}'" for name, words in shapes.items())
    words = ["experiment=memory", f"sweep.variants={{{variants}}}"]
    stdout = call(*words, f"launch.run_dir={tmp_path}")
    figures, rows = table_in(tmp_path / "memory")
    assert figures.keys() == {
        f"{figure}_{name}"
        for figure in ("client_fraction", "trained_fraction", "measured_fraction")
        for name in rows
        if figure != "measured_fraction" or name.startswith("gpt2")
    }
    assert rows.keys() == {"gpt2", "1b", "7b", "gpt2_lora", "1b_lora", "7b_lora"}
    assert 0.05 < figures["client_fraction_7b"] < 0.15
    for row in rows.values():
        assert row["client_fraction"] == row["client"]["peak"] / row["whole"]["peak"]
    assert "measured fraction" in stdout
