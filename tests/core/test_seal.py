"""The seal: sums open to the mean, one client's weights look like noise, and no pad comes twice."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedsplit.client.seal import Seal, SealedWeights, added
from fedsplit.errors import ConfigError, NonFinite

SEAL = Seal(bytes(range(32)))
TOKENS = (300, 50, 251, 97)
MOST = 1000


def weights_of(client):
    random = torch.Generator().manual_seed(client)
    return {
        "wte": torch.randn(50, 16, generator=random),
        "ln": torch.randn(16, generator=random) * 60,
        "scalar": torch.randn((), generator=random),
    }


def sealed(client, seal=SEAL):
    return seal.sealed(weights_of(client), TOKENS[client], MOST, client=client, clients=len(TOKENS))


@pytest.mark.parametrize("clients", [[0, 1, 2, 3], [2], [3, 1]])
def test_a_sum_opens_to_the_mean_of_those_who_are_in_it(clients):
    """So a client that is gone does no harm."""
    found = SEAL.opened(added([sealed(client) for client in clients]))
    total = sum(TOKENS[client] for client in clients)
    for name, mean in found.items():
        exact = sum(TOKENS[c] * weights_of(c)[name].double() for c in clients) / total
        torch.testing.assert_close(mean.double(), exact, rtol=0, atol=1e-5)
        assert mean.dtype == torch.float32 and mean.shape == exact.shape


def test_the_sum_of_nobody_stands_for_the_initial_weights():
    assert SEAL.opened(SealedWeights.none({"wte": (50, 16)}, 4)) == {}


def test_the_order_of_a_sum_does_not_matter_and_a_repeat_opens_to_the_same_bits():
    one = SEAL.opened(added([sealed(0), sealed(1), sealed(2)]))
    # Other nonces, so other pads.
    other = SEAL.opened(added([sealed(2), sealed(0), sealed(1)]))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_sealed_weights_are_uniform():
    weights = {"w": torch.zeros(1 << 16)}
    values = SEAL.sealed(weights, 1, 4, client=0, clients=1).values["w"]
    for counts in (
        np.bincount(values.view(np.uint8), minlength=256),
        np.bincount(values >> 24, minlength=256),
    ):
        expected = counts.sum() / 256
        statistic = float(((counts - expected) ** 2 / expected).sum())
        # 255 degrees of freedom: a mean of 255 and a deviation of 22.6, of which these are six.
        assert abs(statistic - 255) < 136


def test_no_pad_comes_twice():
    first, again = sealed(0), sealed(0)
    for name, values in first.values.items():
        assert not np.array_equal(values, again.values[name])
    assert not np.array_equal(first.nonces, again.nonces)
    # Nor do two tensors of a client have one pad.
    two = SEAL.sealed({"a": torch.zeros(64), "b": torch.zeros(64)}, 1, 2, client=0, clients=1)
    assert not np.array_equal(two.values["a"], two.values["b"])


def test_another_key_does_not_open_them():
    with pytest.raises(ConfigError, match="sealed weights of 2 clients do not open with this key"):
        Seal(bytes(32)).opened(added([sealed(0), sealed(1)]))
    # One client that has another key than the others.
    with pytest.raises(ConfigError, match="do not open with this key"):
        SEAL.opened(added([sealed(0), sealed(1, Seal(bytes(32)))]))


def test_weights_that_no_sum_can_hold_are_refused():
    with pytest.raises(NonFinite, match="w has NaN or Inf"):
        SEAL.sealed({"w": torch.tensor([1.0, float("nan")])}, 1, 2, client=0, clients=1)
    with pytest.raises(ConfigError, match="w has a weight of 300, and sealed ones are below 255"):
        SEAL.sealed({"w": torch.tensor([-300.0])}, 1, 2, client=0, clients=1)


def test_the_largest_weights_do_not_wrap():
    most = {"w": torch.full((4,), 254.9)}
    parts = [SEAL.sealed(most, 1, 4, client=client, clients=4) for client in range(4)]
    torch.testing.assert_close(SEAL.opened(added(parts))["w"], most["w"], rtol=1e-6, atol=0)


def test_more_tokens_than_steps_of_a_whole_number_round_the_shares():
    most, tokens = 1 << 34, (3 << 32, 1 << 30)
    parts = [
        SEAL.sealed(weights_of(number), each, most, client=number, clients=2)
        for number, each in enumerate(tokens)
    ]
    found = SEAL.opened(added(parts))["wte"]
    exact = (12 * weights_of(0)["wte"] + weights_of(1)["wte"]) / 13
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)


def test_a_file_of_tensors_holds_all_bits():
    weights = added([sealed(0), sealed(3)])
    again = SealedWeights.of_tensors(weights.tensors)
    assert again.clients == [0, 3]
    assert all(torch.equal(t, SEAL.opened(weights)[n]) for n, t in SEAL.opened(again).items())


def test_a_key_file_is_made_once_and_read_by_its_owner_alone(tmp_path: Path):
    file = tmp_path / "keys" / "seal.key"
    seal = Seal.kept(file)
    assert file.stat().st_mode & 0o777 == 0o600 and len(file.read_bytes()) == 32
    assert Seal.kept(file).initial == seal.initial != SEAL.initial
    with pytest.raises(ConfigError, match="cannot be read .*; make it once, as with head -c 32"):
        Seal.of(tmp_path / "none.key")
    (tmp_path / "short").write_bytes(b"short")
    with pytest.raises(ConfigError, match="the key of a seal has 32 bytes, but this one 5"):
        Seal.of(tmp_path / "short")
