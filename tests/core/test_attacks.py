"""The attacks of the audit: pure functions that read what they must, and no more than there is."""

import pytest
import torch

from fedsplit.audit.attacks.inverter import inverted
from fedsplit.audit.attacks.labels import label_scores, labels_by_refinement, labels_with_prior
from fedsplit.audit.attacks.search import search
from fedsplit.audit.attacks.words import word_scores, words_found
from fedsplit.model import split_model
from fedsplit.model.trunkless import without_trunk
from simulations.families import random_model
from simulations.tiny import VOCABULARY, tiny_config

TEXTS, TOKENS, BOTTOM = 3, 8, 1


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def ends(request):
    whole = random_model(tiny_config(request.param, num_hidden_layers=4))
    return without_trunk(split_model(whole, f"{BOTTOM}/2/1").client).eval()


@pytest.fixture(scope="module")
def ids_BT():
    return torch.randint(3, VOCABULARY, (TEXTS, TOKENS), generator=torch.manual_seed(0))


def rows_of(ends, ids_BT):
    with torch.no_grad():
        return ends.base_model(ids_BT, output_hidden_states=True).hidden_states[BOTTOM]


def test_rows_without_noise_are_their_text(ends, ids_BT):
    found_BT = search(rows_of(ends, ids_BT), ends=ends, bottom=BOTTOM)
    assert torch.equal(found_BT, ids_BT)


def test_the_coordinates_that_were_sent_are_enough(ends, ids_BT):
    rows_BTD = rows_of(ends, ids_BT)
    least = rows_BTD.abs().flatten(0, 1).sort(dim=-1, descending=True).values[:, 4]
    kept_BTD = rows_BTD * (rows_BTD.abs() >= least.view(TEXTS, TOKENS, 1))
    assert torch.equal(search(kept_BTD, ends=ends, bottom=BOTTOM), ids_BT)


def test_rows_of_another_text_are_that_text(ends, ids_BT):
    other_BT = ids_BT.flip(0, 1)
    found_BT = search(rows_of(ends, other_BT), ends=ends, bottom=BOTTOM)
    assert torch.equal(found_BT, other_BT)


def test_a_prior_helps_where_there_is_noise(ends, ids_BT):
    class Prior:
        """A language model that knows the text."""

        config = ends.config

        def __call__(self, input_ids, past_key_values, **_):
            place = past_key_values.seen = getattr(past_key_values, "seen", 0) + 1
            wanted_B = ids_BT[:, min(place, TOKENS - 1)].repeat_interleave(len(input_ids) // TEXTS)
            logits = torch.full((len(input_ids), 1, VOCABULARY), 0.0)
            logits[torch.arange(len(input_ids)), 0, wanted_B] = 6.0
            return type("Output", (), {"logits": logits})

    rows_BTD = rows_of(ends, ids_BT)
    sigma = 1.5 * float(rows_BTD.std())
    noisy_BTD = rows_BTD + sigma * torch.randn(rows_BTD.shape, generator=torch.manual_seed(1))
    options = {"ends": ends, "bottom": BOTTOM, "sigma": sigma, "beams": 2}
    alone, helped = (
        (search(noisy_BTD, **options, prior=prior) == ids_BT).float().mean()
        for prior in (None, Prior())
    )
    assert alone < 0.9 and helped > alone


def test_a_linear_map_from_public_rows_reads_private_ones():
    chance = torch.manual_seed(2)
    directions_VD = torch.randn(20, 32, generator=chance)
    tokens = [torch.randint(20, (n,), generator=chance) for n in (2000, 200)]
    public, private = (
        directions_VD[t] + 0.1 * torch.randn(len(t), 32, generator=chance) for t in tokens
    )
    found = inverted(private, public, tokens[0], 20)
    assert (found == tokens[1]).float().mean() > 0.99
    # Of a bottom that is not known, but differs by a scale and a shift.
    moved = 3.0 * private + 4.0 * directions_VD[0]
    assert (inverted(moved, public, tokens[0], 20) == tokens[1]).float().mean() < 0.6
    assert (inverted(moved, public, tokens[0], 20, matched=True) == tokens[1]).float().mean() > 0.9


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_words_of_a_step_are_read_from_the_weights(is_tied):
    chance = torch.manual_seed(4)
    tokens = torch.randint(200, (40,), generator=chance)
    used = torch.unique(tokens)
    change_VD = torch.zeros(200, 16)
    if is_tied:
        # All rows move away from the states, by their probabilities, and labels towards them.
        state_D = torch.randn(16, generator=chance)
        change_VD -= torch.rand(200, 1, generator=chance) * state_D
    change_VD[used] += torch.randn(len(used), 16, generator=chance)
    assert words_found(word_scores(change_VD, is_tied=is_tied), tokens) > 0.95
    # Of another text it finds what chance gives.
    other = torch.randint(200, (40,), generator=chance)
    assert words_found(word_scores(change_VD, is_tied=is_tied), other) < 0.4


def test_labels_are_read_from_the_gradient():
    chance = torch.manual_seed(3)
    head_VD, out_BTD = (torch.randn(*shape, generator=chance) for shape in ((50, 8), (2, 6, 8)))
    labels_BT = torch.randint(50, (2, 6), generator=chance)

    def gradient(labels_BT):
        here_BTD = out_BTD.clone().requires_grad_()
        logits_BTV = torch.tanh(here_BTD) @ head_VD.T
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())
        return torch.autograd.grad(loss, here_BTD)[0]

    grad_BTD = gradient(labels_BT)
    assert torch.equal(labels_by_refinement(grad_BTD, head_VD, gradient), labels_BT)
    by_direction = (label_scores(grad_BTD, head_VD).argmax(-1) == labels_BT).float().mean()
    assert 0.3 < by_direction < 1.0
    noise_BTD = 100.0 * torch.randn(grad_BTD.shape, generator=chance)
    shares_BTV = torch.nn.functional.one_hot(labels_BT, 50).float() * 6.0
    under_noise = labels_with_prior(grad_BTD + noise_BTD, head_VD, shares_BTV, 100.0)
    assert (under_noise == labels_BT).float().mean() > 0.9
