"""What a forward leaves behind, and that it goes."""

import gc
import weakref

import torch
from torch import nn

from fedsplit.model.memory import ByteCount


def test_a_counted_graph_goes_when_nobody_runs_it_backward():
    layer = nn.Linear(4, 4)
    count = ByteCount(layer.parameters())
    with count.counting():
        kept_by_autograd = layer(torch.ones(2, 4)).tanh()
        loss = kept_by_autograd.sum()
    assert count.num_bytes == 2 * (2 * 4 * 4), "the input and the result of tanh"
    held = weakref.ref(kept_by_autograd)
    del kept_by_autograd, loss
    gc.collect()
    assert held() is None


def test_counting_changes_no_gradient():
    def gradient(counts):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4), nn.Softmax(dim=-1))
        values = torch.randn(2, 4)
        if counts:
            with ByteCount(model.parameters()).counting():
                out = model(values)
        else:
            out = model(values)
        out.square().sum().backward()
        return [p.grad for p in model.parameters()]

    assert all(map(torch.equal, gradient(True), gradient(False)))
