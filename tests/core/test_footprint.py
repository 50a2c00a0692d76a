"""Bytes of a client in training, counted by hand."""

from dataclasses import replace

import pytest
import torch

from fedsplit.model.memory import ByteCount
from tests.core.worlds import batch, small_run, world

MOMENTS = {"sgd": 0, "adamw": 2}


@pytest.mark.parametrize("optimizer", MOMENTS)
def test_the_peak_is_weights_gradients_moments_and_activations(tiny_llama, optimizer):
    base = small_run()
    run = replace(base, train=replace(base.train, optimizer=optimizer))
    with world(tiny_llama(), run) as here:
        alice = here.add("alice")
        parameters = list(alice.model.parameters())
        in_use = [*parameters, *alice.model.buffers()]
        count = ByteCount(in_use)
        largest = batch(1)
        with alice.trunk.session(), count.counting():
            alice.model(**largest.inputs, labels=largest.labels)
        stats = alice.trainer.fit([[batch(0, rows=1), largest], [batch(2)]])
    trained = sum(p.nbytes for p in parameters)
    step_counts = 4 * len(parameters) if MOMENTS[optimizer] else 0
    held = sum(tensor.nbytes for tensor in in_use) + trained * (1 + MOMENTS[optimizer])
    assert count.num_bytes > 0
    assert stats.peak_bytes == held + step_counts + count.num_bytes


def test_what_was_sent_up_counts_until_its_backward(tiny_llama):
    with world(tiny_llama()) as here:
        trunk, count = here.add("alice").trunk, ByteCount([])
        hidden_BTD = torch.randn(2, 12, 16, requires_grad=True)
        with trunk.session(), count.counting():
            trunk(hidden_BTD)
    assert count.num_bytes == hidden_BTD.nbytes


def test_a_round_without_a_step_has_no_peak(tiny_llama):
    with world(tiny_llama()) as here:
        assert here.add("alice").trainer.fit([]).peak_bytes == 0
