"""What split learning is measured against: the unsplit model, trained by the same loop."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fedsplit.data import hold_out, load_corpus, train_tokenizer
from fedsplit.errors import ConfigError
from fedsplit.model.describe import client_of, config_of, whole_of
from tests.edge.federation import (
    SGD,
    federate,
    joined,
    largest_difference,
    sgd_step,
    spec_for,
    union_of_batches,
)


def test_central_is_the_unsplit_model_on_the_union_of_the_batches(tmp_path):
    run = spec_for(tmp_path, *SGD, "baseline=central", "train.rounds=2")
    training, _ = hold_out(load_corpus(run.data), run.data.held_out, run.seed)
    tokenizer = train_tokenizer(training, run.data.vocabulary)
    judge = whole_of(run, config_of(run, tokenizer)).train()
    losses = [sgd_step(judge, union_of_batches(run, tokenizer, n), run.train.lr) for n in (1, 2)]
    folder = federate(run)
    assert [stats.loss for stats in folder.rounds()] == pytest.approx(losses, abs=1e-6)
    assert largest_difference(joined(folder), judge.state_dict()) < 1e-6
    saved = json.loads((folder.model / "config.json").read_text(encoding="utf-8"))
    assert saved.get("use_cache", True)  # training turns it off, and generation needs it


def test_a_federation_with_one_local_step_is_central(tmp_path):
    split = federate(spec_for(tmp_path / "split", *SGD, "train.rounds=3"))
    central = federate(
        spec_for(
            tmp_path / "split",
            *SGD,
            "train.rounds=3",
            "baseline=central",
            f"launch.run_dir={tmp_path / 'central'}",
        )
    )
    assert largest_difference(joined(split), joined(central)) < 1e-6
    for one, other in zip(split.rounds(), central.rounds(), strict=True):
        assert one.tokens == other.tokens
        assert one.eval_loss == pytest.approx(other.eval_loss, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [(), ("lora=on", "lora.rank=2")], ids=["full", "lora"])
def test_one_client_makes_all_baselines_one(tmp_path, lora):
    words = ("clients=1", "train.rounds=2", "train.local_steps=2", *lora)
    folders = [
        federate(spec_for(tmp_path / "data", *words, f"baseline={name}", f"name={name}"))
        for name in ("central", "fedavg")
    ]
    one, other = map(joined, folders)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    if not lora:  # each part draws the adapters of its own
        split = federate(spec_for(tmp_path / "data", *words, "name=split"))
        assert largest_difference(joined(split), one) < 1e-6


def test_fedavg_carries_whole_models_and_no_activations(tmp_path):
    split = federate(spec_for(tmp_path / "data", "name=split")).rounds()[0]
    fedavg = federate(spec_for(tmp_path / "data", "name=whole", "baseline=fedavg")).rounds()[0]
    assert (fedavg.bytes_up, fedavg.bytes_down, fedavg.clients) == (0, 0, 3)
    assert fedavg.client_weights_bytes > 1.1 * split.client_weights_bytes
    assert fedavg.client_bytes > 1.1 * split.client_bytes
    assert fedavg.tokens == split.tokens


def test_no_trunk_is_the_client_s_own_blocks_trained_alike(tmp_path):
    words = (*SGD, "clients=1", "baseline=no_trunk", "train.rounds=2")
    run = spec_for(tmp_path, *words)
    training, _ = hold_out(load_corpus(run.data), run.data.held_out, run.seed)
    tokenizer = train_tokenizer(training, run.data.vocabulary)
    config = config_of(run, tokenizer)
    judge = whole_of(run, config).train()
    client = client_of(run, config)
    assert judge.config.n_layer == len(client.held_blocks) < config.n_layer
    assert judge.num_parameters() == client.num_parameters()
    losses = [sgd_step(judge, union_of_batches(run, tokenizer, n), run.train.lr) for n in (1, 2)]
    folder = federate(run)
    assert [stats.loss for stats in folder.rounds()] == pytest.approx(losses, abs=1e-6)
    assert [stats.bytes_up for stats in folder.rounds()] == [0, 0]
    assert largest_difference(joined(folder), judge.state_dict()) < 1e-6
    card = (folder.model / "README.md").read_text(encoding="utf-8")
    assert "the clients' own blocks were trained, without a trunk server" in " ".join(card.split())


def test_clients_alone_share_nothing(tmp_path):
    run = spec_for(tmp_path, "baseline=local", "train.rounds=2", "train.save_every=1")
    folder = federate(run)
    assert [stats.client_weights_bytes for stats in folder.rounds()] == [0, 0]
    assert folder.rounds()[1].eval_loss < folder.rounds()[0].eval_loss
    kept = [
        load_file(file)
        for number in range(3)
        for file in folder.path.glob(f"clients/client-{number}/*/round-0002-*/personal.safetensors")
    ]
    name = next(iter(kept[0]))
    assert not torch.equal(kept[0][name], kept[1][name])


@pytest.mark.parametrize(
    "words", [("policy.sim_slowdown={client-0: 2}",), ("strategy=local_loss",)]
)
def test_what_needs_a_trunk_is_refused(tmp_path, words):
    with pytest.raises(ConfigError, match="baseline=fedavg has no trunk"):
        spec_for(tmp_path, "baseline=fedavg", *words)
