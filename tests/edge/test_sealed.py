"""Runs with sealed client weights: what the server holds, and what the clients join at the end."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsplit.client.ledger import bits_of
from fedsplit.client.seal import Seal, SealedWeights
from fedsplit.errors import ConfigError, DataError, ModelMismatch, ProtocolError
from fedsplit.flower.sealed_arrays import record_of, returned
from fedsplit.runs.folder import RunFolder
from fedsplit.runs.sealed_result import joined as joined_sealed
from fedsplit.spec import ModelSpec, RunSpec
from tests.edge.federation import client_that, federate, joined, metrics_lines, spec_for
from tests.edge.nodes import SuperNode, node_of
from tests.edge.resuming import interrupted, resumed

SHAPES = {"w": (4, 3), "b": (3,)}
NOBODYS = record_of(SealedWeights.none(SHAPES, 3))


def key_of(folder: RunFolder) -> Path:
    (key,) = (folder.path.parent / folder.run.name).glob(f"privacy/{folder.id}/seal.key")
    return key


def opened(folder: RunFolder) -> dict[str, Tensor]:
    """The weights of the model that clients join."""
    return joined_sealed(folder, Seal.of(key_of(folder))).state_dict()


def from_checkpoint(folder: Path, *words: str) -> RunSpec:
    """A run whose initial weights are those of a checkpoint, and not those of the key."""
    whole = folder / "before" / "runs" / "tiny"
    if not whole.exists():
        federate(spec_for(folder / "before"))
    model = ModelSpec(pretrained=str(whole / "model"), family="", config={})
    return replace(spec_for(folder, *words), model=model)


@pytest.mark.slow
def test_a_mean_that_nobody_could_read_is_that_of_fedavg(tmp_path: Path) -> None:
    words = "train.rounds=3", "train.local_steps=2"
    sealed = federate(from_checkpoint(tmp_path, *words, "client_weights=sealed", "name=sealed"))
    plain = joined(federate(from_checkpoint(tmp_path, *words, "name=plain")))
    ours = opened(sealed)
    assert ours.keys() == plain.keys()
    differences = [float((ours[name] - plain[name]).abs().max()) for name in plain]
    assert 0 < max(differences) < 1e-5
    told, wanted = metrics_lines(sealed), metrics_lines(RunFolder(tmp_path / "runs" / "plain"))
    for mine, other in zip(told, wanted, strict=True):
        assert mine["eval_loss"] == pytest.approx(other["eval_loss"], abs=1e-4)


def test_the_server_has_no_weight_of_a_client_in_the_clear(tmp_path: Path) -> None:
    folder = federate(spec_for(tmp_path, "client_weights=sealed", "train.rounds=2"))
    weights = opened(folder)
    tokens = weights["transformer.wte.weight"].numpy().tobytes()[:64]
    for file in folder.path.rglob("*"):
        is_clients = "privacy" in file.parts or "clients" in file.parts
        assert is_clients or not file.is_file() or tokens not in file.read_bytes(), file
    sealed = load_file(folder.model / "sealed.safetensors")
    counts = np.bincount(sealed["transformer.wte.weight"].numpy().view(np.uint8).ravel())
    expected = counts.sum() / 256
    statistic = float(((counts - expected) ** 2 / expected).sum())
    # 255 degrees of freedom: a mean of 255 and a deviation of 22.6, of which these are six.
    assert len(counts) == 256 and abs(statistic - 255) < 136


def test_the_initial_weights_are_the_key_s_and_not_those_of_the_run_s_seed(tmp_path: Path) -> None:
    words = "client_weights=sealed", "train.lr=1e-12", "train.schedule=constant"
    one = opened(federate(spec_for(tmp_path / "a", *words)))
    other = opened(federate(spec_for(tmp_path / "b", *words)))
    plain = joined(federate(spec_for(tmp_path / "c", *words[1:])))
    name = "transformer.wte.weight"
    assert not torch.allclose(one[name], other[name], atol=1e-3)
    assert not torch.allclose(one[name], plain[name], atol=1e-3)
    trunk = "transformer.h.1.mlp.c_fc.weight"
    torch.testing.assert_close(one[trunk], plain[trunk], rtol=0, atol=1e-6)


def test_a_client_that_is_gone_does_no_harm(tmp_path: Path) -> None:
    def train(message: Any, context: Any, go_on: Any) -> Any:
        is_gone = context.node_config["partition-id"] == 1
        if is_gone and message.content.config_records["fedsplit"]["round"] == 2:
            raise RuntimeError("the power is gone")
        return go_on()

    run = spec_for(tmp_path, "client_weights=sealed", "train.rounds=3")
    folder = federate(run, client_that(train=train))
    assert [line["clients"] for line in metrics_lines(folder)] == [3, 2, 3]
    assert all(torch.isfinite(weight).all() for weight in opened(folder).values())


@pytest.mark.slow
def test_a_resumed_run_has_the_weights_of_an_undisturbed_one(tmp_path: Path) -> None:
    words = "client_weights=sealed", "train.rounds=3", "train.save_every=1"
    run = from_checkpoint(tmp_path, *words, "name=killed")
    interrupted(run, 3)
    ours = opened(resumed(run))
    theirs = opened(federate(from_checkpoint(tmp_path, *words, "name=undisturbed")))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


@pytest.mark.slow
@pytest.mark.parametrize("words", [("lora=on",), ("client_weights.personal=top",)])
def test_adapters_and_personal_parts_go_with_it(tmp_path: Path, words: tuple[str, ...]) -> None:
    folder = federate(spec_for(tmp_path, "client_weights=sealed", "train.rounds=2", *words))
    state = opened(folder)
    assert not any("lora" in name for name in state), "merged"
    plain = joined(federate(spec_for(tmp_path, "name=plain", *words)))
    assert state.keys() == plain.keys()


@pytest.mark.slow
def test_the_command_joins_the_model_at_a_client(tmp_path: Path) -> None:
    folder = federate(spec_for(tmp_path, "client_weights=sealed"))
    for without in ("serve", "audit"):
        program = [sys.executable, "-m", "fedsplit", without, str(folder.path)]
        refused = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
        assert refused.returncode == 1
        assert "has sealed client weights; `fedsplit join` opens them" in refused.stderr
    out = tmp_path / "whole"
    join = [sys.executable, "-m", "fedsplit", "join", str(folder.path), "--out", str(out)]
    join += ["--key", str(key_of(folder))]
    subprocess.run(join, check=True, timeout=120)
    state = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in opened(folder).items())
    assert (out / "tokenizer.json").exists()


def test_a_run_in_the_clear_has_nothing_to_open(tmp_path: Path) -> None:
    folder = federate(spec_for(tmp_path))
    with pytest.raises(ConfigError, match="is a run without client_weights.sealed; its model is"):
        joined_sealed(folder, Seal(bytes(32)))
    sealed = federate(spec_for(tmp_path, "client_weights=sealed", "name=sealed"))
    with pytest.raises(DataError, match="has sealed client weights; `fedsplit join` opens them"):
        RunFolder.finished(sealed.path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("policy=async", r"does not go with policy.kind=async; set policy.kind=sync"),
        ("policy=quorum", r"does not go with policy.kind=quorum; set policy.kind=sync"),
        (
            "client_weights.strategy=flwr.serverapp.strategy.FedMedian",
            r"strategy=\S*FedMedian; set client_weights.strategy=flwr.serverapp.strategy.FedAvg",
        ),
        ("wire.client_weights=int8", "wire.client_weights=int8; set wire.client_weights=none"),
        ("client_weights.personal=both", "personal=both; set client_weights.personal=none"),
        ("baseline=fedavg", "baseline=fedavg; set baseline=none"),
        ("train.local_epochs=1 train.max_steps=9", "train.local_epochs=1.0; set"),
    ],
)
def test_only_fedavg_of_a_round_is_sealed(tmp_path: Path, words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"client_weights.sealed is FedAvg .*{message}"):
        spec_for(tmp_path, "client_weights=sealed", *words.split())


def test_a_method_that_hands_weights_on_is_refused(tmp_path: Path) -> None:
    run = spec_for(tmp_path, "client_weights=sealed", "strategy=sequential")
    with pytest.raises(ConfigError, match="from client to client, and sealed ones are added"):
        federate(run)


def test_a_supernode_needs_the_key(tmp_path: Path) -> None:
    run = replace(RunSpec(), client_weights=replace(RunSpec().client_weights, sealed=True))
    with pytest.raises(ConfigError, match="start each SuperNode with seal-key=FILE"):
        node_of(run).seal_of(run, "0" * 16)
    (tmp_path / "seal.key").write_bytes(bytes(32))
    seal = node_of(run, seal_key=str(tmp_path / "seal.key")).seal_of(run, "0" * 16)
    assert seal and seal.initial == Seal(bytes(32)).initial
    assert node_of(RunSpec()).seal_of(RunSpec(), "0" * 16) is None


def test_supernodes_decide_their_noise_and_share_a_key(tmp_path: Path) -> None:
    key = tmp_path / "seal.key"
    key.write_bytes(bytes(range(32)))
    config = {"allowed-path": str(tmp_path), "state-dir": str(tmp_path / "kept")}
    config |= {"seal-key": str(key), "privacy": "strict", "privacy-z": 1.0}
    # The server would have less noise.
    words = "clients=2", "privacy=strict", "privacy.z=0.01"
    folder = federate(spec_for(tmp_path, *words), SuperNode(config=config))
    assert metrics_lines(folder)[0]["bits"] == pytest.approx(bits_of(1.0, 16))
    assert not (folder.path / "privacy").exists()
    kept = tmp_path / "kept" / "privacy"
    assert sorted(path.name for path in kept.glob("*/ledger.db")) == ["ledger.db"] * 2
    assert joined_sealed(folder, Seal.of(key)).num_parameters() > 0
    # A run in the clear is refused before the first round.
    with pytest.raises(ConfigError, match="does not go with"):
        federate(spec_for(tmp_path, "clients=2", "name=clear"), SuperNode(config=config))


# --- the reply of a client ------------------------------------------------------------------------


def reply_of(client: int) -> ArrayRecord:
    weights = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    return record_of(Seal(bytes(32)).sealed(weights, 1, 5, client=client, clients=3))


def test_an_honest_reply_passes_as_it_is() -> None:
    reply = reply_of(1)
    passed = returned(reply, NOBODYS, "client-1")
    assert {n: a.data for n, a in passed.items()} == {n: a.data for n, a in reply.items()}


def test_a_reply_with_others_nonces_is_refused() -> None:
    with pytest.raises(ProtocolError, match=r"nonces of the clients \[1\], not its own alone"):
        returned(reply_of(1), NOBODYS, "client-2")
    with pytest.raises(ProtocolError, match=r"nonces of the clients \[\], not its own alone"):
        returned(NOBODYS, NOBODYS, "client-2")


def test_a_reply_of_other_arrays_is_refused() -> None:
    reply = reply_of(1)
    del reply["w"]
    with pytest.raises(ModelMismatch, match="has 3 sealed arrays, not the 4 that were sent"):
        returned(reply, NOBODYS, "client-1")
    wide = ArrayRecord({**reply_of(1), "w": record_of(SealedWeights.none({"w": (5, 3)}, 3))["w"]})
    with pytest.raises(ModelMismatch, match=r"has w as uint32 of shape \(5, 3\), but uint32 of"):
        returned(wide, NOBODYS, "client-1")
