"""Runs with noise: what clients count, what the server is told, and what a node decides."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.client.ledger import Ledger, bits_of
from fedsplit.errors import ConfigError, Diverged
from fedsplit.spec import PrivacySpec, RunSpec
from tests.edge.federation import federate, joined, metrics_lines, spec_for
from tests.edge.forked import Program
from tests.edge.nodes import node_of
from tests.edge.resuming import interrupted, resumed

HIDDEN = 16


def ledgers_of(path: Path) -> list[Path]:
    return sorted(path.glob("privacy/*/client-*/ledger.db"))


def test_a_run_with_noise_says_what_it_told(tmp_path: Path) -> None:
    folder = federate(spec_for(tmp_path, "privacy=noise", "privacy.z=0.5", "train.rounds=2"))
    first, second = metrics_lines(folder)
    one = bits_of(0.5, HIDDEN)
    assert first["bits"] == pytest.approx(one)
    assert second["bits"] == pytest.approx(2 * one), "the held-out text of both rounds"
    assert second["label_bits"] == pytest.approx(one), "no text was trained on twice"
    assert second["row_epsilon"] == pytest.approx(39.38, abs=0.01)
    assert second["sequence_epsilon"] > second["row_epsilon"]
    last = folder.rounds()[-1]
    assert last.told in last.line and last.told in folder.closing_table()
    card = (folder.model / "README.md").read_text(encoding="utf-8")
    assert f"told at most {last.told}, of the worst text" in " ".join(card.split())
    spent = [Ledger(file).spent("rows") for file in ledgers_of(folder.path)]
    assert len(spent) == 3 and max(each.bits for each in spent) == second["bits"]


def test_a_run_without_noise_tells_no_bound(tmp_path: Path) -> None:
    folder = federate(spec_for(tmp_path))
    assert metrics_lines(folder)[0]["bits"] == 0
    assert not ledgers_of(folder.path)
    card = (folder.model / "README.md").read_text(encoding="utf-8")
    assert "Treat this checkpoint as trained on data that the server could read" in " ".join(
        card.split()
    )


def test_gradients_without_noise_tell_the_labels(tmp_path: Path) -> None:
    folder = federate(spec_for(tmp_path, "privacy=noise", "privacy.gradient_z=0"))
    # The vocabulary that was asked for is the most that a token can choose among.
    assert metrics_lines(folder)[0]["label_bits"] == pytest.approx(8.2, abs=0.1)


def test_strict_sends_no_gradient_and_no_weights_in_the_clear(tmp_path: Path) -> None:
    folder = federate(spec_for(tmp_path, "privacy=strict", "train.rounds=2"))
    line = metrics_lines(folder)[-1]
    assert (line["label_bits"], line["version"]) == (0, 0) and line["bits"] > 0
    assert folder.run.client_weights.sealed
    # The bottom and the top learn without a gradient of the trunk.
    assert line["eval_loss"] < metrics_lines(folder)[0]["eval_loss"]


def test_strict_may_keep_the_weights_at_the_clients(tmp_path: Path) -> None:
    words = "privacy=strict", "client_weights.sealed=false", "client_weights.personal=both"
    folder = federate(spec_for(tmp_path, *words))
    assert metrics_lines(folder)[0]["client_weights_bytes"] == 0


def test_a_resumed_run_continues_its_ledger_and_its_noise(tmp_path: Path) -> None:
    run = spec_for(tmp_path, "privacy=noise", "train.rounds=3", "train.save_every=1")
    interrupted(run, 2)
    (folder,) = (tmp_path / "runs").iterdir()
    keys = [file.read_bytes() for file in sorted(folder.glob("privacy/*/*/noise.key"))]
    before = [Ledger(file).spent("rows").num_rows for file in ledgers_of(folder)]
    again = resumed(run)
    assert [f.read_bytes() for f in sorted(folder.glob("privacy/*/*/noise.key"))] == keys
    after = [Ledger(file).spent("rows").num_rows for file in ledgers_of(folder)]
    # What was trained again after the last checkpoint was sent with the same bytes.
    assert all(rows < most for rows, most in zip(before, after, strict=True))
    assert again.rounds()[-1].bits == pytest.approx(3 * bits_of(0.5, HIDDEN))


def test_the_noise_key_is_its_owner_s_alone(tmp_path: Path) -> None:
    folder = federate(spec_for(tmp_path, "privacy=noise"))
    keys = sorted(folder.path.glob("privacy/*/*/noise.key"))
    assert [file.stat().st_mode & 0o777 for file in keys] == [0o600] * 3
    assert len({file.read_bytes() for file in keys}) == 3


def test_a_run_ends_when_no_client_has_budget_left(tmp_path: Path) -> None:
    run = spec_for(tmp_path, "privacy=noise", "privacy.budget_bits=4", "train.rounds=3")
    with pytest.raises(Diverged, match="PrivacyBudget: one more release of a text would tell"):
        federate(run)


def test_public_text_gives_the_statistics(tmp_path: Path) -> None:
    text = tmp_path / "public.txt"
    text.write_text("the of and to in is that it was for on are as with his they\n" * 200)
    run = spec_for(tmp_path, "privacy=noise", f"privacy.public={text}")
    random = spec_for(tmp_path, "privacy=noise", "name=random")
    one, other = joined(federate(run)), joined(federate(random))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_public_text_that_cannot_be_used_is_found_before_the_first_round(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the")
    run = spec_for(tmp_path, "privacy=noise", f"privacy.public={tmp_path / 'short.txt'}")
    with pytest.raises(ConfigError, match="privacy.public=.*short.txt, the public text, cannot be"):
        federate(run)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["privacy.kind=strict"], "train.mode=joint sends gradients, which determine the labels"),
        (
            ["privacy.kind=strict", "train.mode=isolated"],
            "the server gets no client weights that it can read",
        ),
        (["privacy=noise", "baseline=fedavg"], "is noise at the cut, and baseline=fedavg has none"),
        (["privacy=noise", "privacy.z=0"], "privacy=noise with privacy.z=0.0 has no noise"),
        (["privacy=noise", "privacy.z=1e-200"], "set privacy.z to 1e-06 or more"),
        (["privacy=noise", "privacy.gradient_z=1e-9"], "privacy.gradient_z=1e-09 is no noise"),
        (["privacy=dp"], "privacy.kind='dp' is not one of: off, noise, strict"),
    ],
)
def test_what_would_undo_the_protection_is_refused(
    tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_for(tmp_path, *words)


# --- what a node decides --------------------------------------------------------------------------


def test_a_node_decides_its_noise_whatever_the_run_says(tmp_path: Path) -> None:
    given = {"privacy": "noise", "privacy-z": 2, "privacy-budget-bits": 8.5}
    node = node_of(RunSpec(), **given, **{"state-dir": str(tmp_path)})
    assert node.privacy == PrivacySpec(kind="noise", z=2, budget_bits=8.5)
    assert node.secrets_of(RunSpec(), "0" * 16) == tmp_path / "privacy" / "client-0"
    lax = RunSpec(privacy=PrivacySpec(kind="noise", z=0.001, gradient_z=0))
    assert node_of(lax, **given).privacy == PrivacySpec(kind="noise", z=2, budget_bits=8.5)
    # A run may ask for more noise than the default, and not for less.
    assert node_of(lax, privacy="noise").privacy == PrivacySpec(kind="noise")
    noisy = RunSpec(privacy=PrivacySpec(kind="noise", z=3, gradient_z=4))
    assert node_of(noisy, privacy="noise").privacy == noisy.privacy
    # What the node does not say is the run's.
    assert node_of(lax).privacy == lax.privacy


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"privacy": "strict"},
            "privacy of this node does not go with the run: .*train.mode=joint",
        ),
        ({"privacy": "some"}, "privacy.kind='?some"),
        ({"privacy-z": 2}, "privacy-z in the node's config has no effect if the run says privacy="),
        ({"privacy": 3}, "privacy=3 in the node's config must be text"),
        ({"privacy-z": "much"}, "privacy-z='much' in the node's config must be a number"),
        ({"privacy": "noise", "privacy-z": -1.0}, "privacy.z=-1.0 is too small"),
    ],
)
def test_a_node_s_privacy_that_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        node_of(RunSpec(), **given)


def test_a_supernode_without_a_folder_keeps_no_ledger_and_so_sends_nothing() -> None:
    run = replace(RunSpec(), privacy=PrivacySpec(kind="noise"))
    with pytest.raises(ConfigError, match="keeps a noise key and a ledger .* start its SuperNode"):
        node_of(run).secrets_of(run, "0" * 16)


# --- generation -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_text_is_generated_under_noise_and_counted(tmp_path: Path) -> None:
    folder = federate(spec_for(tmp_path, "train.rounds=2"))
    state = tmp_path / "state"
    with Program("fedsplit", "serve", str(folder.path), "--bind", "127.0.0.1:0") as server:
        assert server.stdout.readline(), "it is ready"
        words = [sys.executable, "-m", "fedsplit", "generate", "--run", str(folder.path)]
        words += ["--max-new-tokens", "4", "the of and", "--noise", "0.5"]
        told = [
            subprocess.run(
                [*words, "--state-dir", str(state)],
                capture_output=True,
                text=True,
                timeout=120,
                check=True,
            )
            for _ in range(2)
        ]
    # The same key and the same prompt: the same noise, and so the same text.
    assert told[0].stdout == told[1].stdout
    assert "told the server, at most: 2.6 bits/token, epsilon 24.4 a row and" in told[1].stderr
    spent = Ledger(state / "ledger.db").spent("rows")
    assert spent.num_texts == 2 and spent.bits == bits_of(0.5, HIDDEN)
    without = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert without.returncode == 2 and "--noise and --state-dir go together" in without.stderr
