"""Micro-batches are the whole batch, up to the rounding of sums, and the same bits every time."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsplit import errors
from fedsplit.client.trainer import ClientTrainer
from fedsplit.client.unsplit import NoTrunk
from fedsplit.data import TASKS
from fedsplit.data.batches import Batch, micro_batches
from fedsplit.link import LocalLink
from fedsplit.model import join_model
from fedsplit.spec import ModelSpec, WireSpec
from fedsplit.wire import messages as m
from tests.core.worlds import batch, same, small_run, world

NEXT_TOKENS = TASKS["causal_lm"].num_predictions
CLASSES = TASKS["sequence_classification"].num_predictions
GROUPS = [[batch(i, rows=4), batch(i + 50, rows=3, pad=3)] for i in range(3)]


def run_with(number, **changes):
    """Two batches of up to four rows a step, each in this many pieces."""
    train = {"batch_size": 4, "accumulation": 2, "micro_batches": number}
    train |= changes.pop("train", {})
    run = small_run(**changes)
    return replace(run, train=replace(run.train, **train))


def fit(config, run, link=LocalLink):
    """What training came to: its statistics, and the weights of all parts."""
    with world(config, run) as here:
        alice = here.add("alice", link(here.service, here.service.admit("alice")))
        stats = alice.trainer.fit(GROUPS)
        ends = {k: p.detach() for k, p in alice.model.named_parameters()}
        return stats, here.trunk_weights() | ends


def assert_close(found, wanted, atol=1e-6):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=0, msg=name)


# --- cutting ----------------------------------------------------------------------------------


@given(rows=st.integers(1, 9), number=st.integers(1, 12) | st.just(1 << 60), pad=st.integers(0, 10))
def test_pieces_are_the_batch(rows, number, pad):
    whole = batch(rows=rows, pad=pad)
    pieces = micro_batches(whole, number, NEXT_TOKENS)
    sizes = [len(piece.labels) for piece in pieces]
    assert len(pieces) == min(rows, number)
    assert max(sizes) - min(sizes) <= 1
    assert sum(piece.num_tokens for piece in pieces) == whole.num_tokens
    assert torch.cat([piece.labels for piece in pieces]).equal(whole.labels)
    for name, tensor in whole.inputs.items():
        assert torch.cat([piece.inputs[name] for piece in pieces]).equal(tensor)


def test_a_piece_without_predictions_is_left_out():
    whole = batch(rows=3, pad=12)
    assert [len(piece.labels) for piece in micro_batches(whole, 3, NEXT_TOKENS)] == [1, 1]
    assert micro_batches(whole, 1, NEXT_TOKENS) == [whole]


def test_of_classes_every_row_counts():
    rows = Batch(inputs={"x": torch.ones(5, 2)}, labels=torch.arange(5), num_tokens=5, num_bytes=0)
    assert [piece.num_tokens for piece in micro_batches(rows, 3, CLASSES)] == [2, 2, 1]


# --- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 3, 4, 9])
def test_training_is_that_of_whole_batches(tiny_gpt2, number):
    wanted, weights = fit(tiny_gpt2(), run_with(1))
    stats, found = fit(tiny_gpt2(), run_with(number))
    assert stats.loss == pytest.approx(wanted.loss, abs=1e-6)
    assert (stats.steps, stats.num_tokens) == (wanted.steps, wanted.num_tokens)
    assert_close(found, weights)


def test_training_is_that_of_the_unsplit_model(tiny_llama):
    run = run_with(2, train={"optimizer": "adamw", "lr": 1e-3, "clip_norm": 0.05})
    with world(tiny_llama(), run) as here:
        alice = here.add("alice")
        whole = join_model(alice.model, here.parts.trunk)
        alice.trainer.fit(GROUPS)
        found = join_model(alice.model, here.parts.trunk).state_dict()
    plain = replace(run, train=replace(run.train, micro_batches=1))
    ClientTrainer(whole, NoTrunk(whole, client="alice"), plain).fit(GROUPS)
    assert_close(found, whole.state_dict())


def test_an_unsplit_model_takes_them_too(tiny_llama):
    with world(tiny_llama()) as here:
        parts = here.add("alice").model, here.parts.trunk
        wholes = [join_model(*parts) for _ in range(2)]
    for whole, number in zip(wholes, (1, 2), strict=True):
        ClientTrainer(whole, NoTrunk(whole, client="a"), run_with(number)).fit(GROUPS)
    assert_close(wholes[1].state_dict(), wholes[0].state_dict())


ALIKE = [
    pytest.param({"train": {"trunk_steps": 2}}, 1e-6, id="several trunk steps"),
    pytest.param({"train": {"checkpointing": "all"}}, 1e-6, id="checkpointing"),
    pytest.param({"train": {"label_smoothing": 0.1}}, 1e-6, id="label smoothing"),
    pytest.param({"model": ModelSpec(autocast="bfloat16")}, 5e-3, id="autocast"),
    pytest.param({"wire": WireSpec(grad_up="int8", grad_down="int8")}, 5e-3, id="few bits"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "atol"), ALIKE)
def test_it_goes_with(tiny_gpt2, changes, atol):
    _, weights = fit(tiny_gpt2(), run_with(1, **changes))
    found = [fit(tiny_gpt2(), run_with(2, **changes))[1] for _ in range(2)]
    assert_close(found[0], weights, atol)
    assert same(*found)


LOSSY = WireSpec(grad_up="int4", grad_down="int4")


@pytest.mark.slow
@pytest.mark.parametrize("train", [{}, {"checkpointing": "all"}], ids=["plain", "recomputing"])
@pytest.mark.parametrize("wire", [WireSpec(), LOSSY], ids=["exact", "lossy"])
@pytest.mark.parametrize("number", [2, 3])
def test_dropout_is_the_same_every_time(tiny_gpt2, number, wire, train):
    config = tiny_gpt2(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    found = [fit(config, run_with(number, wire=wire, train=train)) for _ in range(2)]
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])


def test_memory_is_that_of_the_pieces_under_way(tiny_llama):
    whole, pieces = (fit(tiny_llama(), run_with(n))[0].peak_bytes for n in (1, 2))
    assert pieces == pytest.approx(whole, rel=0.05)


# --- the wire ---------------------------------------------------------------------------------


class Noting(LocalLink):
    """A link that writes down what is sent, in order."""

    sent: list[str]

    def __init__(self, service, token):
        super().__init__(service, token)
        type(self).sent = []

    def exchange(self, request):
        if isinstance(request, m.ForwardRequest | m.BackwardRequest):
            self.sent.append(f"{type(request).__name__[0]}{request.call}")
        return super().exchange(request)


def test_the_next_forward_is_sent_before_a_backward(tiny_llama):
    fit(tiny_llama(), run_with(2))
    orders = []
    for number in (1, 2):
        with world(tiny_llama(), run_with(number)) as here:
            link = Noting(here.service, here.service.admit("alice"))
            here.add("alice", link).trainer.fit(GROUPS[:1])
        orders.append(" ".join(link.sent))
    assert orders == ["F0 B0 F1 B1", "F0 F1 B0 B1 F2 F3 B2 B3"]


def test_a_graph_that_expired_is_made_again_of_its_own_piece(tiny_gpt2):
    short_of_memory = WireSpec(stash_bytes=1)
    config = tiny_gpt2(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    _, wanted = fit(config, run_with(2))
    _, found = fit(config, run_with(2, wire=short_of_memory))
    assert_close(found, wanted)


class Losing(LocalLink):
    """A link that loses every fifth reply, after the trunk has worked."""

    count = 0

    def exchange(self, request):
        reply = super().exchange(request)
        self.count += 1
        if self.count % 5 == 0:
            raise errors.ConnectionLost("the reply was lost", retry_after_s=1e-3)
        return reply


@pytest.mark.parametrize("number", [2, 3])
def test_lost_replies_change_no_number(tiny_gpt2, number):
    config = tiny_gpt2(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    found = [fit(config, run_with(number), link) for link in (LocalLink, Losing)]
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])


# --- failures ---------------------------------------------------------------------------------


class Failing(LocalLink):
    """A link on which some requests fail, each once; those of call 0 after some time."""

    failures: dict[tuple[type, int], errors.FedsplitError]

    def exchange(self, request):
        failure = self.failures.pop((type(request), getattr(request, "call", -1)), None)
        if failure:
            if isinstance(failure, errors.SessionLost):
                super().exchange(m.CloseRequest(session=request.session))
            time.sleep(0.05 if request.call == 0 else 0.0)
            raise failure
        return super().exchange(request)


FORWARD, BACKWARD = m.ForwardRequest, m.BackwardRequest
PASSING = [
    pytest.param({(FORWARD, 1): errors.StaleVersion("late")}, id="stale"),
    pytest.param({(BACKWARD, 2): errors.StaleVersion("late")}, id="stale backward"),
    pytest.param({(BACKWARD, 0): errors.SessionLost("gone")}, id="no session"),
    pytest.param(
        {(FORWARD, 3): errors.SessionLost("gone"), (BACKWARD, 2): errors.SessionLost("gone")},
        id="no session, for two pieces at once",
    ),
]


@pytest.mark.parametrize("failures", PASSING)
def test_a_step_is_repeated_whole(tiny_gpt2, failures):
    config = tiny_gpt2(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    wanted, weights = fit(config, run_with(2))
    link = type("Some", (Failing,), {"failures": dict(failures)})
    stats, found = fit(config, run_with(2), link)
    assert (stats.steps, stats.refused, stats.repeated) == (3, 0, 1)
    assert stats.loss == wanted.loss
    assert same(found, weights)


def test_the_first_failure_in_order_is_told(tiny_llama):
    failures = {(FORWARD, 0): errors.NonFinite("first"), (FORWARD, 1): errors.BadTensor("second")}
    link = type("Some", (Failing,), {"failures": failures})
    with world(tiny_llama(), run_with(2)) as here:
        alice = here.add("alice", link(here.service, here.service.admit("alice")))
        with alice.trunk.session(), pytest.raises(errors.NonFinite, match="first"):
            alice.trainer.step(GROUPS[0])
    assert not [t for t in threading.enumerate() if t.name.startswith("fedsplit-relay")]
