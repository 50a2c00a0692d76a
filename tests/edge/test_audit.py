"""The audit of a run: what its server reads, with the controls that judge the instrument."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread

from fedsplit.audit.census import COVERED
from fedsplit.audit.report import NO_TRUNK, Audit, audit
from fedsplit.audit.table import Cell, defences
from fedsplit.cli import main
from fedsplit.errors import ConfigError, DataError
from fedsplit.runs.folder import RunFolder
from tests.edge.federation import federate, spec_for

pytestmark = pytest.mark.slow

CHANCE = 0.2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return federate(spec_for(tmp_path_factory.mktemp("audited"), "model.config.n_layer=4"))


@pytest.fixture(scope="module")
def found(folder: RunFolder) -> Audit:
    return audit(folder, quick=True, noise=[1.0])


def test_the_server_reads_everything_without_a_defence(found: Audit) -> None:
    for defence in ("off", "int8 up", "one more block"):
        for attack in ("text", "labels", "generation"):
            assert found.value(defence, attack) >= 0.98, (defence, attack)
    assert re.fullmatch("leak  text 100%  labels 100%  words [0-9]+%", found.leak)
    # A head that is tied to the embedding changes all rows, and those of the text otherwise.
    words = next(cell for cell in found.cells if cell.attack == "words")
    assert words.value > words.chance + 0.2
    assert found.value("off", "text, linear") > found.chance


def test_noise_hides_the_text_and_the_shield_keeps_the_loss(found: Audit) -> None:
    assert found.value("noise 1", "text") < 0.6 * found.value("off", "text")
    assert abs(found.losses["noise 1"] - found.losses["off"]) < 0.2
    assert found.value("gradient noise 0.5", "labels") < 0.6
    assert "labels" not in {c.attack for c in found.cells if c.defence == "no gradient"}
    assert found.losses["no gradient"] == found.losses["off"]


def test_who_does_not_know_the_weights_reads_less(found: Audit) -> None:
    personal = next(name for name in found.losses if name.startswith("personal"))
    for defence in (personal, "sealed weights", "strict 0.5"):
        assert "words" not in {c.attack for c in found.cells if c.defence == defence}
        assert found.value(defence, "text") <= found.value("off", "text")
    assert found.value("sealed weights", "text") < 0.7
    assert found.value("sealed weights", "labels") < 0.5
    assert found.losses["sealed weights"] == found.losses["off"], "of the same weights"
    # Sequences that the server knows help it.
    assert found.value("sealed weights", "text, 16 known") > found.chance
    assert "labels" not in {c.attack for c in found.cells if c.defence == "strict 0.5"}


def test_the_controls_and_the_census_are_there(found: Audit) -> None:
    assert found.broken == "" and found.negative <= found.chance + 0.02
    assert set(found.census) >= {
        "ForwardRequest.smashed_BTD",
        "BackwardRequest.grad_trunk_out_BTD",
        "GenerateRequest.smashed_BTD",
        "client weights",
    }
    assert set(found.census.values()) <= set(COVERED.values())
    assert NO_TRUNK in found.losses
    assert {cell.seed for cell in found.cells} == {0} and all(cell.n for cell in found.cells)


def test_an_instrument_that_reads_too_little_or_too_much_is_broken() -> None:
    def cell(attack: str, value: float) -> Cell:
        return Cell(defence="off", attack=attack, value=value, chance=0.1, n=9, seconds=0.0, seed=0)

    good = [cell("text", 1.0), cell("labels", 0.99)]
    assert Audit(cells=good, chance=0.1, negative=0.12).broken == ""
    assert Audit(cells=good[:1], chance=0.1).broken == ""  # no gradient was sent
    assert "chance is 10.0%" in Audit(cells=good, chance=0.1, negative=0.13).broken
    weak = [cell("text", 1.0), cell("labels", 0.9)]
    assert "labels recovers 90.0% and must recover 99%" in Audit(cells=weak).broken
    assert Audit().broken


def test_the_command_prints_the_table_and_leaves_files(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "audited"
    words = ["audit", str(folder.path), "--quick", "--noise", "0", "--out", str(out)]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "leak  text 100%  labels 100%  words" in told and NO_TRUNK in told
    table = json.loads((out / "table.json").read_text(encoding="utf-8"))
    assert {cell["defence"] for cell in table["cells"]} == {
        each.name for each in defences([0.0], trunk_blocks=2)
    }
    assert (out / "audit.md").read_text(encoding="utf-8").count("\n|") == 13
    assert imread(out / "audit.png").std() > 0.01


def test_a_model_is_audited_before_any_run(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = Path(folder.run.data.path).read_text(encoding="utf-8").splitlines()
    for name, some in {"private": lines[:20], "public": lines[20:]}.items():
        (tmp_path / name).write_text("\n".join(some), encoding="utf-8")
    words = ["audit", str(folder.model), "--split", "1/*/1", "--quick", "--noise", "0"]
    words += ["--private", str(tmp_path / "private"), "--public", str(tmp_path / "public")]
    assert main([*words, "--out", str(tmp_path / "audited")]) == 0
    assert "leak  text 100%  labels 100%  words" in capsys.readouterr().out
    assert (tmp_path / "audited" / "table.json").exists()
    assert main(["audit", str(folder.model), "--split", "1/*/1"]) == 2
    assert "a model needs --private FILE and --public FILE" in capsys.readouterr().err


def test_a_run_may_end_with_its_audit(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "simulations.run", "experiment=toy", "privacy.audit=end"]
    words += [f"launch.run_dir={tmp_path}", "model.config.n_layer=3", "train.local_steps=1"]
    words += ["model.config.n_embd=16", "model.config.n_head=2", "data.vocabulary=300"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    (leak,) = (line for line in done.stdout.splitlines() if line.startswith("leak"))
    assert (tmp_path / "toy" / "audit" / "table.json").exists()
    card = (tmp_path / "toy" / "model" / "README.md").read_text(encoding="utf-8")
    assert leak in card and "| sealed weights |" in card


@pytest.mark.parametrize("words", [["client_weights=sealed"], ["baseline=fedavg"]])
def test_a_run_without_a_joined_model_cannot_end_with_it(tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(ConfigError, match="privacy.audit=end reads"):
        spec_for(tmp_path, "privacy.audit=end", *words)


def test_what_cannot_be_audited_is_refused(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["audit", str(folder.path), "--noise", "much"]) == 1
    assert "--noise=much: give numbers from 0 to 100" in capsys.readouterr().err
    with pytest.raises(DataError, match="is not a run's folder"):
        audit(RunFolder(tmp_path))
    baseline = replace(folder.run, baseline="fedavg", name="whole")
    with pytest.raises(ConfigError, match="baseline=fedavg; the audit reads split language models"):
        audit(federate(baseline))
