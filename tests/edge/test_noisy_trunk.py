"""A trunk that is trained under noise: the losses and shares that the trial reports are real."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedsplit.audit.attacks.search import search
from fedsplit.audit.scene import share_equal
from fedsplit.data import load_corpus
from fedsplit.errors import CheckpointError
from fedsplit.model.trunkless import without_trunk
from fedsplit.spec import DataSpec
from simulations.noisy_trunk import NoisyTrunk, Trial, main
from simulations.smollm2 import save_smollm2
from tests.edge.tiny_models import make_model

FIGURES = {
    *("noisy_before", "noisy_after", "clean_before", "clean_after", "steps"),
    *("no_trunk_before", "no_trunk_after", "recovered", "recovered_clean", "chance"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("noisy")
    make_model(place / "model", width=32)
    texts = [document.text for document in load_corpus(DataSpec()).documents]
    for name, some in {"public": texts[:9], "private": texts[9:12]}.items():
        (place / name).write_text("\n".join(some), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def noisy(place: Path) -> NoisyTrunk:
    texts = {name: str(place / name) for name in ("public", "private")}
    sizes = {"tokens": 16, "measured": 4}
    return NoisyTrunk(Trial(model=str(place / "model"), split="1/*/1", z=0.5, **texts, **sizes))


def test_almost_no_noise_changes_nothing(noisy: NoisyTrunk, place: Path) -> None:
    clean, ids_BT = noisy.loss(noisy.clean), noisy.private_BT
    whole = AutoModelForCausalLM.from_pretrained(place / "model")
    assert clean == pytest.approx(whole(ids_BT, labels=ids_BT).loss.item(), abs=1e-5)
    quiet = copy.copy(noisy)
    quiet.trial = replace(noisy.trial, z=1e-6)
    quiet.statistics = replace(noisy.statistics, radius=1e3)  # no row is longer
    assert quiet.loss(quiet.noisy) == pytest.approx(clean, abs=1e-3)
    assert noisy.loss(noisy.noisy) != pytest.approx(clean, abs=1e-2)


def test_steps_have_new_noise_and_measurements_the_same(noisy: NoisyTrunk) -> None:
    ids_BT = noisy.private_BT
    first, again, other = (noisy.noisy(ids_BT, name) for name in ("step 0", "step 0", "step 1"))
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=1e-3)


def test_a_shortlist_finds_what_all_tokens_give(noisy: NoisyTrunk) -> None:
    ends: Any = copy.deepcopy(without_trunk(noisy.parts.client)).requires_grad_(False)
    # As in a trained model, a token's row depends more on itself than on those before it.
    ends.model.layers[0].self_attn.o_proj.weight.mul_(2e-3)
    ids_BT = noisy.private_BT[:3, :10]
    rows_BTD = ends.model(ids_BT, output_hidden_states=True).hidden_states[1]
    sigma = float(rows_BTD.std())
    noise_BTD = torch.randn(rows_BTD.shape, generator=torch.Generator().manual_seed(0))
    known = {"ends": ends, "bottom": 1, "sigma": sigma, "prior": noisy.whole, "beams": 2}
    whole_BT, *others = (
        search(rows_BTD + sigma * noise_BTD, **known, shortlist=n) for n in (0, 300, 60)
    )
    assert 0.2 < share_equal(whole_BT, ids_BT) < 1.0, "the noise matters"
    assert torch.equal(others[0], whole_BT), "the vocabulary has no more"
    assert share_equal(others[1], whole_BT) >= 0.9


def test_a_missing_file_of_the_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone.gguf is no file; give the model's GGUF file"):
        save_smollm2(tmp_path / "model", tmp_path / "gone.gguf")


def test_the_command_trains_attacks_and_writes_its_figures(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = place / "found.json"
    words = [str(place / "model"), "--split", "1/*/1", "--z", "0.05", "--steps", "2", "--json"]
    words += [str(file), "--public", str(place / "public"), "--private", str(place / "private")]
    words += ["--tokens", "16", "--measured", "4", "--every", "1", "--attacked-tokens", "8"]
    assert main([*words, "--rank", "4", "--shortlist", "0"]) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    figures = found["figures"]
    assert figures.keys() == FIGURES and all(map(math.isfinite, figures.values()))
    assert found["trial"]["z"] == 0.05 and figures["steps"] == 2
    assert figures["recovered_clean"] == 1.0, "without noise, the attack must read everything"
    assert figures["chance"] < figures["recovered"] <= 1.0
    assert figures["noisy_after"] != figures["noisy_before"]
    steps = [row["step"] for row in found["rows"] if "noisy" in row]
    assert steps == [0, 1, 2, 2]
    assert main([str(place / "model"), "--split", "9/*/9", *words[3:]]) == 2
    assert "noisy_trunk: " in capsys.readouterr().err
