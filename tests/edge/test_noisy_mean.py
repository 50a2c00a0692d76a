"""Client weights in Flower's wrappers of differential privacy: clipping, noise, accountant."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsplit.errors import ConfigError
from fedsplit.flower.records import ARRAYS, METRICS, WEIGHT
from fedsplit.flower.server_app import _client_strategy
from fedsplit.flower.strategy.noisy_mean import NoisyMean
from fedsplit.flower.strategy.state import load_state_into, state_of
from fedsplit.runs.folder import RunFolder
from tests.edge.federation import client_that, federate, joined, metrics_lines, spec_for
from tests.edge.resuming import interrupted, resumed

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


def test_a_server_that_was_killed_counts_a_round_that_may_have_left_it(tmp_path: Path) -> None:
    run = spec_for(tmp_path, *NOISY, ACCOUNTANT, "train.rounds=2")
    interrupted(run, 2)
    spent = [line["weights_epsilon"] for line in metrics_lines(resumed(run))]
    # Its third release is the second round, done again.
    assert spent == pytest.approx([4.7285, 9.0100], abs=1e-3)


def test_going_back_takes_no_release_back(tmp_path: Path) -> None:
    strategy = _client_strategy(spec_for(tmp_path, *NOISY, ACCOUNTANT))
    assert isinstance(strategy, NoisyMean)
    before = state_of(strategy)
    assert strategy.epsilon == 0.0
    strategy.recount()
    once = strategy.epsilon
    load_state_into(strategy, before)
    strategy.recount()
    assert strategy.epsilon == once == pytest.approx(4.7285, abs=1e-3)


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
        ((*NOISY, ACCOUNTANT, "client_weights.wrap_options.noise_multiplier=0"), "positive"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    tmp_path: Path, words: tuple[str, ...], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        federate(spec_for(tmp_path, *words))
    assert not (tmp_path / "runs").exists()


def test_too_few_clients_for_the_noise_are_named(tmp_path: Path) -> None:
    options = "client_weights.wrap_options={noise_multiplier:1.0,clipping_norm:1.0,"
    run = spec_for(tmp_path, *NOISY, options + "num_sampled_clients:4}")
    with pytest.raises(ConfigError, match="is for 4 clients a round, and 3 can work in round 1"):
        federate(run)
