"""What one types and what it leaves: the program, its folder, its refusals and its end."""

import math
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import psutil
import pytest
import torch
from matplotlib.image import imread
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsplit.config import from_yaml
from fedsplit.data import (
    evaluation_batches,
    hold_out,
    load_corpus,
    shard_held_out,
    tokenize,
)
from fedsplit.runs.folder import RunFolder
from fedsplit.spec import RunSpec
from tests.edge.federation import federate, metrics_lines, overrides_for, spec_for
from tests.edge.forked import Program
from tests.house.source import ROOT

# --- the folder ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    return spec_for(tmp_path_factory.mktemp("run"), "train.rounds=2", "train.local_steps=2")


def listening() -> set[int]:
    """The ports that this process listens on."""
    mine = psutil.Process().net_connections(kind="inet")
    return {each.laddr.port for each in mine if each.status == psutil.CONN_LISTEN}


@pytest.fixture(scope="module")
def before() -> set[int]:
    """The ports of the tests that this process ran before."""
    return listening()


@pytest.fixture(scope="module")
def folder(before: set[int], run: RunSpec) -> RunFolder:
    return federate(run)


def test_a_run_leaves_what_the_readme_promises(run: RunSpec, folder: RunFolder) -> None:
    left = {path.name for path in folder.path.iterdir()}
    files = {"run.json", "config.yaml", "metrics.jsonl", "loss.png", "report.html", "sample.txt"}
    assert left == files | {"model", "checkpoints", "clients"}
    sample = (folder.path / "sample.txt").read_text(encoding="utf-8").strip()
    assert f'sample of its text              "{sample}"' in folder.closing_table()
    kept = from_yaml((folder.path / "config.yaml").read_text(encoding="utf-8"))
    assert (kept, kept.fingerprint) == (run, run.fingerprint)


def test_a_run_s_metrics_add_up(run: RunSpec, folder: RunFolder) -> None:
    lines = metrics_lines(folder)
    assert [line["round"] for line in lines] == [1, 2]
    assert [line["version"] for line in lines] == [2, 4]
    for line in lines:
        assert (line["clients"], line["late"], line["failed"], line["rounds"]) == (3, 0, 0, 2)
        full = run.clients * run.train.local_steps * run.train.batch_size * 15
        assert full * 0.8 < line["tokens"] <= full
        assert 0 < line["loss"] < 2 * math.log(300)
        # Hidden states of both directions are the same tensors' sizes; the rest is headers.
        assert line["bytes_up"] == pytest.approx(line["bytes_down"], rel=0.1)
        assert line["bytes_up"] > line["tokens"] * run.model.config["n_embd"] * 4
        assert line["seconds"] > 0


def test_a_run_s_picture_is_one(folder: RunFolder) -> None:
    assert (folder.path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    pixels = imread(folder.path / "loss.png")
    assert pixels.shape[:2] == (480, 840)
    assert pixels[..., :3].std() > 0.05


def test_a_run_s_model_is_what_was_measured(run: RunSpec, folder: RunFolder) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder.path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder.path / "model")
    _, held_out = hold_out(load_corpus(run.data), run.data.held_out, run.seed)
    nats = num_bytes = 0.0
    for piece in shard_held_out(held_out, run.sharding, run.clients, run.seed):
        sequences = tokenize(piece, tokenizer, run.data)
        for batch in evaluation_batches(sequences, run.train.batch_size):
            with torch.no_grad():
                loss = model(
                    **batch.inputs,
                    labels=batch.labels,
                ).loss
            nats += loss.item() * batch.num_tokens
            num_bytes += batch.num_bytes
    measured = nats / math.log(2) / num_bytes
    assert folder.rounds()[-1].bits_per_byte == pytest.approx(measured, abs=1e-4)


def test_a_run_s_card_says_what_it_was(run: RunSpec, folder: RunFolder) -> None:
    card = (folder.path / "model" / "README.md").read_text(encoding="utf-8")
    last = folder.rounds()[-1]
    for said in (
        load_corpus(run.data).sha256,
        run.fingerprint,
        r"| tokens | each document as TEXT <\|endoftext\|>; special tokens that a document spells ",
        "| split (bottom/trunk/top, blocks) | 1/",
        "| policy | sync, ",
        "| rounds | 2 of 2 steps per client, 4 trunk steps",
        f"{last.bits_per_byte:.4f} bits/byte in round 2 |",
        "What split learning does not protect",
    ):
        assert said in card


def test_folders_are_never_shared(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: RunFolder.claim(tmp_path, "x").path.name, range(24)))
        begun = list(pool.map(lambda _: RunFolder.begin(tmp_path, "y", "z").path.name, range(24)))
    expected = ["", *(f"-{number}" for number in range(2, 25))]
    assert sorted(claimed) == sorted(f"x{suffix}" for suffix in expected)
    assert sorted(begun) == sorted(f"y{suffix}" for suffix in expected)


def test_a_run_begins_in_the_folder_that_was_claimed_for_it(tmp_path: Path) -> None:
    claimed = RunFolder.claim(tmp_path, "x")
    assert RunFolder.begin(tmp_path, "x", "seed: 0\n").path == claimed.path
    claimed.give_back()
    assert (claimed.path / "config.yaml").read_text(encoding="utf-8") == "seed: 0\n"


def test_nothing_listens_when_a_run_is_over(before: set[int], folder: RunFolder) -> None:
    assert listening() <= before


# --- the program --------------------------------------------------------------------------------


def start(*words: str) -> Program:
    return Program("simulations.run", *words)


@pytest.mark.slow
def test_two_runs_at_once_print_and_leave_their_own(tmp_path: Path) -> None:
    words = overrides_for(tmp_path, "train.rounds=2")
    results = [program.end() for program in [start(*words), start(*words)]]
    assert [(code, stderr) for code, _, stderr in results] == [(0, ""), (0, "")]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"tiny", "tiny-2"}
    for _, stdout, _ in results:
        heading, *rounds = stdout.split("\n\n")[0].splitlines()
        name = heading.split()[1]
        if name == "tiny-2":
            renamed = rounds.pop(0)
            first, second = tmp_path / "runs" / "tiny", tmp_path / "runs" / "tiny-2"
            assert renamed == f"{first} has no result, so a new run begins in {second}"
        assert heading.endswith("sharding over 3 clients, policy sync, launch inline")
        folder = RunFolder(tmp_path / "runs" / name)
        assert rounds == [stats.line for stats in folder.rounds()]
        assert "last (round " in stdout
        left = (
            "checkpoints/ clients/ config.yaml loss.png metrics.jsonl model/ report.html run.json "
            "sample.txt"
        )
        assert stdout.splitlines()[-4:] == [
            f"left in {folder.path}: {left}",
            f"compare it: fedsplit compare {folder.path} ANOTHER_RUN",
            f"generate with it: fedsplit serve {folder.path}",
            f'  and beside it: fedsplit generate --run {folder.path} "SOME TEXT"',
        ]


def test_a_run_that_finds_nothing_to_resume_says_so(tmp_path: Path) -> None:
    folder = federate(spec_for(tmp_path)).path
    code, stdout, stderr = start(*overrides_for(tmp_path, "resume=auto", "train.lr=0.01")).end()
    assert (code, stderr) == (0, "")
    second = folder.with_name("tiny-2")
    told = f"nothing to resume: {folder} is finished, so a new run begins in {second}"
    assert stdout.splitlines()[1] == told


def test_a_sweep_leaves_a_folder_for_each_job(tmp_path: Path) -> None:
    words = overrides_for(tmp_path, "sharding=natural,iid")
    code, stdout, stderr = start("-m", *words).end()
    assert (code, stderr) == (0, "")
    specs = [
        from_yaml((tmp_path / "runs" / name / "config.yaml").read_text(encoding="utf-8"))
        for name in ("tiny", "tiny-2")
    ]
    assert [spec.sharding.kind for spec in specs] == ["natural", "iid"]
    for spec in specs:
        assert f"({spec.fingerprint})" in stdout
    folders = f"{tmp_path / 'runs' / 'tiny'} {tmp_path / 'runs' / 'tiny-2'}"
    assert stdout.splitlines()[-1] == f"compare them: fedsplit compare {folders}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["wire.up=zip"], "wire.up='zip' is not one of: none, bf16, fp16"),
        (["split=1/9/1"], "blocks of which the trunk needs at least 9; lower one of them"),
    ],
    ids=["a value", "a split"],
)
def test_a_wrong_value_is_refused_in_a_line(tmp_path: Path, words: list[str], message: str) -> None:
    code, _, stderr = start(*overrides_for(tmp_path, *words)).end()
    assert code == 1
    assert stderr.startswith("error: ") and message in stderr and stderr.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["corpus.txt"]


def test_a_run_whose_clients_cannot_take_part_ends_with_the_reason(tmp_path: Path) -> None:
    code, _, stderr = start(*overrides_for(tmp_path, "wire.tls_ca=/nowhere/ca.pem")).end()
    assert code == 1
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "cannot take part: ConfigError: " in line
    assert "wire.tls_ca=/nowhere/ca.pem cannot be read" in line
    assert "Traceback" not in stderr


def wait_for_round_3(output: IO[str]) -> None:
    """Read a run's output up to its third round; at the end of the output, the run has failed."""
    assert any(line.startswith("round   3/") for line in iter(output.readline, ""))


@pytest.mark.slow
def test_an_interrupted_run_ends_at_once(tmp_path: Path) -> None:
    """Its clients would wait for their trunk for wire.budget_s, which is minutes."""
    words = overrides_for(tmp_path, "train.rounds=5000")
    command = [sys.executable, "-m", "simulations.run", *words]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        wait_for_round_3(process.stdout)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
    assert (process.returncode, stderr) == (130, "interrupted\n")


def test_a_run_ends_quietly_and_whole_when_nobody_reads_it_any_more(tmp_path: Path) -> None:
    words = overrides_for(tmp_path, "train.rounds=5000", "train.save_every=1")
    program = start(*words)
    wait_for_round_3(program.stdout)
    program.stdout.close()  # as `head -4` does
    code, _, stderr = program.end()
    assert (code, stderr) == (141, "")
    folder = RunFolder(tmp_path / "runs" / "tiny")
    rounds = len(folder.rounds())  # and each of its lines is a whole one
    assert 3 < rounds < 5000 and rounds - 1 <= folder.last_checkpoint <= rounds


def test_help_lists_the_groups_with_examples_and_loads_no_torch() -> None:
    code = "import sys, simulations.run as run; run.main(); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (0, "")
    for (
        group
    ) in "model split lora data sharding train policy wire strategy launch experiment".split():
        assert f"\n  {group} " in shown.stdout
    assert shown.stdout.count("\n  python -m simulations.run ") == 3
