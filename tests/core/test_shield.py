"""The shield around a trunk: noise of the stated size on what leaves, and nothing else changes."""

import math
from dataclasses import replace

import pytest
import torch

from fedsplit.client.ledger import Ledger
from fedsplit.client.privacy import NoiseKey, PublicRows, Shield, clipped
from fedsplit.errors import ConfigError
from fedsplit.model import connect, split_model
from simulations.families import random_model
from simulations.tiny import VOCABULARY, tiny_config

D = 32
KEY = NoiseKey(bytes(range(32)))


def rows(*shape, seed=0):
    mixing_DD = torch.randn(D, D, generator=torch.manual_seed(9))
    return torch.randn(*shape, D, generator=torch.manual_seed(seed)) @ mixing_DD + 1.0


@pytest.fixture
def public():
    return PublicRows.of(rows(4000))


class Trunk:
    """Keeps what it is sent, and its gradients."""

    def __init__(self):
        self.sent, self.gradients = [], []

    def __call__(self, hidden_BTD, *inputs, **named):
        self.sent.append(hidden_BTD.detach())
        out_BTD = hidden_BTD * 2.0 + 1.0
        if out_BTD.requires_grad:
            out_BTD.register_hook(self.gradients.append)
        return out_BTD.clone()  # hooks of its user are those of the copy


def test_without_noise_the_shield_is_not_there(public):
    trunk, hidden_BTD = Trunk(), rows(2, 3, seed=1)
    out_BTD = Shield(trunk, public, KEY, z=0.0)(hidden_BTD)
    assert torch.equal(trunk.sent[0], hidden_BTD)
    assert torch.equal(out_BTD, hidden_BTD * 2.0 + 1.0)


def test_the_noise_has_the_stated_size_and_rows_are_clipped(public):
    trunk, hidden_BTD = Trunk(), 3.0 * rows(4, 500, seed=2)
    Shield(trunk, public, KEY, z=0.5, shrink=False)(hidden_BTD)
    noise_BTD = trunk.sent[0] - public.clipped(hidden_BTD)
    assert float(noise_BTD.std()) == pytest.approx(0.5 * public.radius, rel=0.01)
    assert abs(float(noise_BTD.mean())) < 0.01 * public.radius
    distances = (public.clipped(hidden_BTD) - public.mean_D).norm(dim=-1)
    assert float(distances.max()) <= public.radius * (1 + 1e-5)


def test_the_same_rows_are_sent_with_the_same_noise_and_others_with_other_noise(public):
    trunk, hidden_BTD = Trunk(), rows(2, 4, seed=3)
    shield = Shield(trunk, public, KEY, z=0.5)
    for sent in (hidden_BTD, hidden_BTD.clone(), hidden_BTD[1:], hidden_BTD + 1e-3):
        shield(sent)
    Shield(trunk, public, NoiseKey.new(), z=0.5)(hidden_BTD)
    first, again, second_alone, near, other_key = trunk.sent
    assert torch.equal(first, again) and torch.equal(first[1:], second_alone)
    for other in (near, other_key):
        assert float((first - other).norm(dim=-1).min()) > 0.1 * public.radius


def test_two_sizes_of_noise_do_not_cancel(public):
    trunk, hidden_BTD = Trunk(), rows(4, 100, seed=3)
    for z in (0.5, 0.6):
        Shield(trunk, public, KEY, z=z, shrink=False)(hidden_BTD)
    # With the same noise in both, this would be the row itself.
    solved_BTD = (0.6 * trunk.sent[0] - 0.5 * trunk.sent[1]) / 0.1
    noise_BTD = solved_BTD - public.clipped(hidden_BTD)
    assert float(noise_BTD.std()) == pytest.approx(2**0.5 * 3.0 * public.radius, rel=0.02)


def test_two_sizes_of_noise_on_gradients_do_not_cancel(public):
    trunk, weights_BTD = Trunk(), rows(4, 100, seed=4)
    for gradient in (0.5, 0.6):
        shield = Shield(trunk, public, KEY, z=0.0, gradient=gradient, grad_radius=1e3)
        (shield(rows(4, 100, seed=3).requires_grad_()) * weights_BTD).sum().backward()
    one, other = ((grad_BTD - weights_BTD) / 1e3 for grad_BTD in trunk.gradients)
    solved_BTD = (0.6 * one - 0.5 * other) / 0.1
    assert float(solved_BTD.std()) == pytest.approx(2**0.5 * 3.0, rel=0.02)


@pytest.mark.parametrize("radius", [0.0, math.nan, math.inf])
def test_noise_in_units_of_no_radius_is_refused(public, radius):
    with pytest.raises(ConfigError, match=f"the public rows have a radius of {radius}, so noise"):
        Shield(Trunk(), replace(public, radius=radius), KEY, z=0.5)


def test_a_ledger_needs_to_know_the_texts(public, tmp_path):
    trunk, ledger = Trunk(), Ledger(tmp_path / "ledger.db")
    shield = Shield(trunk, public, KEY, z=0.5, ledger=ledger)
    with pytest.raises(ConfigError, match="of which text these rows are, so nothing was sent"):
        shield(rows(2, 4, seed=3))
    assert trunk.sent == [] and ledger.spent("rows").num_rows == 0
    with shield.of(torch.zeros(2, 4, dtype=torch.long)):
        shield(rows(2, 4, seed=3))
    # Both sequences are the same text.
    assert (ledger.spent("rows").num_texts, ledger.spent("rows").num_rows) == (1, 8)


def test_only_the_trunk_s_contribution_is_computed_from_noisy_rows(public):
    trunk, hidden_BTD = Trunk(), rows(2, 4, seed=4)
    out_BTD = Shield(trunk, public, KEY, z=0.5)(hidden_BTD)
    sent_BTD = trunk.sent[0]
    torch.testing.assert_close(out_BTD, hidden_BTD + (sent_BTD * 2.0 + 1.0 - sent_BTD))
    plain = Shield(trunk, public, KEY, z=0.5, bypass=False, shrink=False)
    assert torch.equal(plain(hidden_BTD), trunk.sent[1] * 2.0 + 1.0)


def test_shrinking_brings_noisy_rows_closer_to_the_true_ones(public):
    trunk, hidden_BTD = Trunk(), rows(4, 200, seed=5)
    for shrink in (True, False):
        Shield(trunk, public, KEY, z=0.4, shrink=shrink)(hidden_BTD)
    shrunk, plain = ((sent - public.clipped(hidden_BTD)).square().mean() for sent in trunk.sent)
    assert shrunk < 0.8 * plain


@pytest.mark.parametrize("gradient", ["send", "none", 0.5])
def test_the_trunk_gets_the_gradient_that_was_asked_for(public, gradient):
    trunk, hidden_BTD = Trunk(), rows(2, 4, seed=6).requires_grad_()
    shield = Shield(trunk, public, KEY, z=0.0, gradient=gradient, grad_radius=2.0)
    out_BTD, weights_BTD = shield(hidden_BTD), rows(2, 4, seed=7)
    (out_BTD * weights_BTD).sum().backward()
    if gradient == "none":
        # The residual stream alone carries it to the bottom.
        assert trunk.gradients == [] and torch.equal(hidden_BTD.grad, weights_BTD)
        return
    (got_BTD,) = trunk.gradients
    if gradient == "send":
        assert torch.equal(got_BTD, weights_BTD)
        return
    noise_BTD = got_BTD - clipped(weights_BTD, 2.0)
    assert float(noise_BTD.std()) == pytest.approx(0.5 * 2.0, rel=0.15)


def test_a_model_trains_and_generates_through_it():
    whole = random_model(tiny_config("gpt2", num_hidden_layers=4))
    parts = split_model(whole, "1/2/1")
    ids_BT = torch.randint(3, VOCABULARY, (2, 6), generator=torch.manual_seed(8))
    hidden = whole.base_model(ids_BT, output_hidden_states=True).hidden_states[1]
    public = PublicRows.of(hidden.flatten(0, 1))
    shield = Shield(parts.trunk.run, public, KEY, z=0.1)
    connect(parts.client, shield, parts.trunk.new_cache)
    parts.client(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    trained = [*parts.client.parameters(), *parts.trunk.parameters()]
    assert all(p.grad is not None and math.isfinite(float(p.grad.norm())) for p in trained)
    text_BT = parts.client.eval().generate(ids_BT, max_new_tokens=3, do_sample=False)
    assert text_BT.shape == (2, 9)


def test_a_key_of_another_size_is_refused():
    with pytest.raises(ConfigError, match="a noise key has 32 bytes, but this one 5"):
        NoiseKey(b"short")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"z": -1.0}, "z=-1.0: give a size of noise"),
        ({"z": math.nan}, "z=nan: give a size of noise"),
        ({"z": 0.0, "gradient": "never"}, "gradient='never': give send, none or a size"),
        ({"z": 0.0, "gradient": 0.5}, "gradient=0.5 is in units of grad_radius=inf"),
    ],
)
def test_noise_without_a_size_is_refused(public, options, message):
    with pytest.raises(ConfigError, match=message):
        Shield(Trunk(), public, KEY, **options)
