"""The stash: one backward each, for a time, within a budget."""

import pytest
import torch
from torch import nn

from fedsplit.errors import ActivationExpired
from fedsplit.model.memory import ByteCount
from fedsplit.trunk.batched_pass import BatchedForward
from fedsplit.trunk.compute import Inputs
from fedsplit.trunk.stash import Graph, Stash

ALICES, BOBS = object(), object()
"""Replicas; a stash tells them apart and nothing more."""


def graph(num_bytes=10, expires_at=100.0, barrier=0, replica=ALICES, batched=None):
    x = torch.zeros(1, requires_grad=True)
    inputs = Inputs(smashed_BTD=x, attention_mask_BT=None, position_ids_BT=None, dropout="")
    return Graph(
        inputs=inputs,
        trunk_out_BTD=x * 2,
        replica=replica,
        version=barrier,
        barrier_version=barrier,
        num_bytes=num_bytes,
        expires_at=expires_at,
        batched=batched,
    )


def pass_of_two(num_bytes=20):
    """The graphs of two clients that shared a pass."""
    x = torch.zeros(2, requires_grad=True)
    batched = BatchedForward(
        smashed_BTD=x, trunk_out_BTD=x * 2, num_bytes=num_bytes, rows=(1, 1), autocast=""
    )
    return [graph(num_bytes=num_bytes // 2, batched=batched) for _ in batched.rows]


def test_a_graph_is_handed_out_once():
    stash, kept = Stash(100), graph()
    assert stash.put("s", 1, kept) == []
    assert stash.take("s", 1) is kept
    assert (len(stash), stash.num_bytes) == (0, 0)
    with pytest.raises(ActivationExpired, match="graph of call 1 is gone.*repeat the forward"):
        stash.take("s", 1)


def test_the_oldest_make_way_and_the_newest_is_always_kept():
    stash = Stash(25)
    first, second, huge = graph(), graph(), graph(num_bytes=1000)
    assert stash.put("a", 1, first) == []
    assert stash.put("b", 1, second) == []
    assert stash.put("c", 1, huge) == [first, second]
    assert stash.num_bytes == 1000


def test_one_that_floods_the_stash_evicts_itself():
    stash = Stash(30)
    quiet = graph()
    stash.put("quiet", 0, quiet)
    flood = [graph() for _ in range(5)]
    dropped = [stash.put("flood", call, each) for call, each in enumerate(flood)]
    assert dropped == [[], [], [flood[0]], [flood[1]], [flood[2]]]
    assert stash.take("quiet", 0) is quiet


def test_a_joint_pass_is_held_as_long_as_one_of_its_graphs():
    stash, (mine, yours) = Stash(100), pass_of_two()
    stash.put("a", 0, mine), stash.put("b", 0, yours), stash.put("b", 1, graph())
    assert stash.num_bytes == 20 + 10
    stash.drop_session("a")
    assert stash.num_bytes == 20 + 10, "b's graph is the same one"
    assert stash.take("b", 0) is yours
    assert stash.num_bytes == 10


def test_a_joint_pass_makes_way_as_a_whole():
    stash, batched, alone, new = Stash(35), pass_of_two(), graph(), graph()
    stash.put("a", 0, batched[0]), stash.put("b", 0, batched[1]), stash.put("c", 0, alone)
    assert stash.put("d", 0, new) == batched
    assert (stash.take("c", 0), stash.take("d", 0)) == (alone, new)


def test_a_client_at_its_share_is_not_dropped_for_one_that_wants_more():
    stash, mine, yours = Stash(20), graph(), graph()
    stash.put("quiet", 0, mine), stash.put("flood", 0, yours)
    assert stash.put("flood", 1, graph()) == [yours]
    assert stash.take("quiet", 0) is mine


def test_a_client_that_floods_drops_its_own_graphs_before_those_of_a_joint_pass():
    stash, (mine, yours), alone = Stash(35), pass_of_two(), graph()
    stash.put("quiet", 0, mine), stash.put("flood", 0, yours), stash.put("flood", 1, alone)
    assert stash.put("flood", 2, graph()) == [alone]
    assert stash.take("quiet", 0) is mine


def test_old_graphs_of_a_replica_go():
    stash = Stash(100)
    graphs = [graph(barrier=barrier) for barrier in range(4)]
    for call, each in enumerate(graphs):
        stash.put("s", call, each)
    stash.put("t", 0, graph(replica=BOBS))
    assert stash.drop_older(ALICES, 2) == graphs[:2]
    assert len(stash) == 3


def test_a_repeated_forward_replaces_its_graph():
    stash, old = Stash(100), graph()
    stash.put("s", 1, old)
    assert stash.put("s", 1, graph()) == [old]
    assert stash.num_bytes == 10


def test_sessions_and_old_graphs_are_dropped():
    stash = Stash(100)
    old, young, other = graph(expires_at=5.0), graph(expires_at=50.0), graph(expires_at=50.0)
    stash.put("a", 1, old), stash.put("a", 2, young), stash.put("b", 1, other)
    assert stash.drop_expired(5.0) == [old]
    assert stash.drop_session("a") == [young]
    assert stash.num_bytes == 10


def test_what_a_forward_keeps_is_counted_without_the_weights():
    layer, x = nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    count = ByteCount(layer.parameters())
    with count.counting():
        layer(x).tanh()
    assert count.num_bytes == 2 * x.nbytes, "the input of the product and the output of tanh"
