"""Client weights in Flower's wrappers of differential privacy: clipping, noise, accountant."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from flwr.supercore.privacy_accounting import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    SamplingMethod,
)
from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant
from torch import Tensor

from fedsplit.errors import ConfigError, DataError, Diverged
from fedsplit.flower.records import ARRAYS, METRICS, WEIGHT
from fedsplit.flower.server_app import _client_strategy
from fedsplit.flower.strategy.noisy_mean import NoisyMean
from fedsplit.runs.folder import RunFolder
from tests.edge.federation import client_that, federate, joined, metrics_lines, spec_for
from tests.edge.resuming import breaking_in, interrupted, resumed

NOISY = "client_weights=noisy", "train.save_every=1"
ACCOUNTANT = "+client_weights.wrap_options.accountant={target_delta:1e-5}"
BUDGET = "+client_weights.wrap_options.accountant={target_delta:1e-5,max_epsilon:%s}"


def sized(noise: float, norm: float) -> tuple[str, ...]:
    options = f"noise_multiplier={noise}", f"clipping_norm={norm}"
    return *NOISY, *(f"client_weights.wrap_options.{each}" for each in options)


def change(folder: RunFolder, other: RunFolder) -> Tensor:
    """The difference of the client weights of two runs, as one vector."""
    mine, theirs = joined(folder), joined(other)
    parts = [n for n in mine if ".h.1." not in n and ".h.2." not in n]
    return torch.cat([(mine[name] - theirs[name]).flatten().double() for name in parts])


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("untrained")
    return federate(spec_for(folder, "train.lr=1e-30", "train.rounds=1"))


def test_each_change_is_clipped_before_it_is_averaged(tmp_path: Path, untrained: RunFolder) -> None:
    run = spec_for(tmp_path, *sized(1e-9, 0.01), "train.rounds=1")
    norm = float(change(federate(run), untrained).norm())
    # The mean of three changes of this norm, which agree in part.
    assert 0.002 < norm <= 0.01 * 1.0001


def test_the_noise_of_the_mean_has_the_size_of_one_client_s_share(
    tmp_path: Path, untrained: RunFolder
) -> None:
    run = spec_for(tmp_path, *sized(5.0, 1e-3), "train.rounds=1")
    noise = change(federate(run), untrained)
    assert float(noise.std()) == pytest.approx(5.0 * 1e-3 / 3, rel=0.03)


def test_clients_have_equal_weights_however_many_tokens_they_have(
    tmp_path: Path, untrained: RunFolder
) -> None:
    def train(message: Any, context: Any, go_on: Any) -> Any:
        reply = go_on()
        number = context.node_config["partition-id"]
        reply.content.metric_records[METRICS][WEIGHT] = 10 ** (2 * number)
        arrays = reply.content.array_records[ARRAYS]
        for name, array in arrays.items():
            values = array.numpy()
            arrays[name] = type(array)(values * 0 + number)
        return reply

    run = spec_for(tmp_path, *sized(1e-9, 1e6), "train.rounds=1", "guard=off")
    folder = federate(run, client_that(train=train))
    weight = joined(folder)["transformer.ln_f.weight"]
    # The mean of 0, 1 and 2.
    torch.testing.assert_close(weight, torch.ones_like(weight), atol=1e-5, rtol=0)


def test_the_accountant_counts_each_round_and_training_ends_with_the_budget(tmp_path: Path) -> None:
    run = spec_for(tmp_path, *NOISY, BUDGET % 8, "train.rounds=4")
    lines = metrics_lines(folder := federate(run))
    # Moments accountant, noise 1, delta 1e-5; the third would be 9.01.
    spent = [line["weights_epsilon"] for line in lines]
    assert spent == pytest.approx([4.7285, 7.0774], abs=1e-3)
    assert folder.is_finished and joined(folder)
    assert lines[-1]["eval_loss"] is not None


@pytest.mark.slow
def test_a_server_that_was_killed_counts_what_had_left_it(tmp_path: Path) -> None:
    run = spec_for(tmp_path, *NOISY[:1], "train.save_every=2", ACCOUNTANT, "train.rounds=3")
    # No checkpoint has the first round, so it is trained anew with other noise: three times in each
    # of two processes before they end, and once more in the third.
    interrupted(run, 2)
    with pytest.raises(Diverged, match="the power is gone"):
        federate(replace(run, resume="auto"), breaking_in(2))
    lines = metrics_lines(folder := resumed(run))
    assert (folder.path / "releases.txt").read_text() == "11"
    assert lines[-1]["weights_epsilon"] == pytest.approx(epsilon_of(11), abs=1e-9)


def test_a_budget_that_is_spent_when_a_run_is_resumed_ends_it(tmp_path: Path) -> None:
    run = spec_for(tmp_path, *NOISY, BUDGET % 8, "train.rounds=4")
    folder = interrupted(run, 2)
    # The second round had left the server, and only the checkpoint of the first is there.
    (folder.path / "releases.txt").write_text("2")
    ended = resumed(run)
    assert ended.is_finished and len(metrics_lines(ended)) == 1 and joined(ended)


def epsilon_of(releases: int) -> float:
    accountant = RdpAccountant(
        PrivacyConfig(
            target_delta=1e-5,
            population_size=3,
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
            sampling_method=SamplingMethod.NO_AMPLIFICATION,
        )
    )
    accountant.compose(GaussianPrivacyEvent(1.0, 3, 3), releases)
    return accountant.get_privacy_spent().epsilon


def test_a_client_that_changed_nothing_ends_no_run(tmp_path: Path) -> None:
    def train(message: Any, context: Any, go_on: Any) -> Any:
        reply = go_on()
        reply.content[ARRAYS] = message.content.array_records[ARRAYS]
        return reply

    run = spec_for(tmp_path, *NOISY, ACCOUNTANT, "guard=off")
    folder = federate(run, client_that(train=train))
    assert folder.is_finished and metrics_lines(folder)[0]["weights_epsilon"] == 0.0


def test_a_damaged_count_of_releases_is_named(tmp_path: Path) -> None:
    file = tmp_path / "releases.txt"
    file.write_text("many")
    strategy = _client_strategy(spec_for(tmp_path, *NOISY, ACCOUNTANT))
    assert isinstance(strategy, NoisyMean)
    with pytest.raises(DataError, match="releases.txt has no number of releases, but 'many'"):
        strategy.count_in(file)


CLIENT_SIDE = "flwr.serverapp.strategy.DifferentialPrivacyClientSideFixedClipping"
ADAPTIVE = "flwr.serverapp.strategy.DifferentialPrivacyServerSideAdaptiveClipping"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((*NOISY, "policy.missing=drop"), "set policy.missing=wait"),
        ((*NOISY, "policy.missing=drop", "policy.kind=async"), "set policy.kind=sync"),
        ((*NOISY, "client_weights.sealed=true"), "client_weights.sealed=False"),
        ((*NOISY, "client_weights.personal=both"), "client_weights.personal=none"),
        ((*NOISY, "strategy=sequential"), "client_weights.wrap would have no effect"),
        ((*NOISY, f"client_weights.wrap={CLIENT_SIDE}"), "DifferentialPrivacyServerSideFixed"),
        ((*NOISY, f"client_weights.wrap={ADAPTIVE}"), "refuses the options"),
        ((*NOISY, "client_weights.wrap=flwr.serverapp.strategy.FedAvg"), "refuses the options"),
        ((*NOISY, "+client_weights.wrap_options.accountant={delta:1}"), "target_delta"),
        ((*NOISY, BUDGET % 2), "too small for one round"),
        (
            (*NOISY, ACCOUNTANT, "client_weights.wrap_options.noise_multiplier=0"),
            "must be positive",
        ),
        ((*NOISY, ACCOUNTANT, "client_weights.wrap_options.noise_multiplier=nan"), "accounted: "),
        ((*NOISY, "+client_weights.wrap_options.num_sampled_clients=1"), "clients is no option"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    tmp_path: Path, words: tuple[str, ...], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        federate(spec_for(tmp_path, *words))
    assert not (tmp_path / "runs").exists()


def test_a_round_needs_all_clients(tmp_path: Path) -> None:
    class Two:
        def get_node_ids(self) -> list[int]:
            return [1, 2]

    strategy = _client_strategy(spec_for(tmp_path, *NOISY))
    with pytest.raises(ConfigError, match="with all 3 clients, and 2 can work in round 1; start"):
        strategy.configure_train(1, ArrayRecord(), ConfigRecord(), cast(Grid, Two()))
