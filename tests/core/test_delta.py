"""Differences in place of activations: fewer bytes, the same error, and nothing lost by a loss."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import RecordDict
from transformers import GPT2Config

from fedsplit.errors import BadTensor, ConfigError, HistoryLost, ProtocolError
from fedsplit.flower.records import JoinInfo, Memory
from fedsplit.link import Link, LocalLink
from fedsplit.spec import RunSpec, TrainSpec, WireSpec
from fedsplit.wire import messages as m
from fedsplit.wire.codec import encode_tensor
from fedsplit.wire.delta import NEW, UNKEPT, DeltaDecoder, Reference, as_restored
from tests.core.worlds import Member, World, batch, same, small_run, world

WIRE = WireSpec(up="huffman:0.6", down="huffman:0.2", history_bytes=1 << 20)
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TINY = GPT2Config(
    n_layer=4, n_embd=16, n_head=2, n_positions=64, vocab_size=64, eos_token_id=0, **QUIET
)
ROW_BYTES = 2 * 2 * 12 * 16
"""Of one example of `batch` in a history, up and down."""
EPOCHS = [0, 1, 2, 1, 0, 2, 2, 0, 1]
Numbers = tuple[list[float], dict[str, torch.Tensor]]


class Forgetful(Link):
    """The trunk has forgotten everything whenever a forward comes for the first time."""

    def __init__(self, here: World) -> None:
        self._inner = LocalLink(here.service, here.service.admit("alice"))
        self._here = here
        self.brought = 0

    def exchange(self, request: m.Request[m.R]) -> m.R:
        if isinstance(request, m.ForwardRequest):
            self.brought += bool(request.references)
            if not request.references:
                self._here.service.decoder.forget("alice")
        return self._inner.exchange(request)

    def close(self) -> None:
        self._inner.close()


def run_of(**wire: object) -> RunSpec:
    return small_run(wire=replace(WIRE, budget_s=10.0, **wire))


def trained(alice: Member, seeds: Sequence[int]) -> list[float]:
    with alice.trunk.session():
        return [alice.trainer.step([batch(seed)]).loss for seed in seeds]


def numbers(here: World, losses: list[float]) -> Numbers:
    ends = {k: p.detach().clone() for k, p in here.members["alice"].model.named_parameters()}
    return losses, ends | here.trunk_weights()


@pytest.fixture(scope="module")
def expected() -> Numbers:
    with world(TINY, run_of()) as here:
        return numbers(here, trained(here.add("alice"), EPOCHS))


# --- one tensor ----------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["huffman:0.6", "int8", "int4", "bf16", "topk:0.3"])
def test_what_has_hardly_changed_takes_fewer_bytes_or_has_less_error(codec: str) -> None:
    torch.manual_seed(0)
    whole_BTD = torch.randn(2, 12, 256)
    base_BTD = whole_BTD + 0.05 * torch.randn_like(whole_BTD)
    plain_BTD = as_restored(whole_BTD, codec, torch.zeros_like(whole_BTD))
    changed_BTD = as_restored(whole_BTD, codec, base_BTD)
    error, plain = (float((each - whole_BTD).norm()) for each in (changed_BTD, plain_BTD))
    sizes = [encode_tensor(whole_BTD, codec, base)[0].nbytes for base in (base_BTD, None)]
    if codec.startswith("huffman"):
        step = 0.6 * whole_BTD.square().mean(dim=2).sqrt().amax() * 1.01
        assert (changed_BTD - whole_BTD).abs().max() <= step / 2
        assert error < 1.1 * plain
        assert sizes[0] < 0.6 * sizes[1]
    else:
        assert error < 0.2 * plain
        assert sizes[0] == sizes[1]


def test_of_what_was_never_there_a_difference_is_the_thing_itself() -> None:
    whole_BTD = torch.randn(2, 3, 8)
    zeros_BTD = torch.zeros_like(whole_BTD)
    for codec in ("huffman:0.6", "int4:stochastic"):
        bytes_ = [bytes(encode_tensor(whole_BTD, codec, base)[1]) for base in (None, zeros_BTD)]
        assert bytes_[0] == bytes_[1]


# --- training ------------------------------------------------------------------------------------


def test_the_first_time_nothing_changes_and_the_second_time_fewer_bytes_cross() -> None:
    sizes: dict[str, list[int]] = {}
    losses: dict[str, list[float]] = {}
    for name, run in (("whole", run_of(history_bytes=0)), ("differences", run_of())):
        with world(TINY, run) as here:
            link = LocalLink(here.service, here.service.admit("alice"))
            forwards: list[m.ForwardRequest] = []
            alice = here.add("alice", Watched(link, forwards))
            losses[name] = trained(alice, EPOCHS)
            sizes[name] = [
                encode_tensor(each.smashed_BTD, each.codec, each.base_BTD)[0].nbytes
                for each in forwards
            ]
    assert losses["whole"][:3] == losses["differences"][:3]
    assert sizes["whole"][:3] == sizes["differences"][:3]
    assert losses["whole"][3:] != losses["differences"][3:]
    assert sum(sizes["differences"][3:]) < 0.8 * sum(sizes["whole"][3:])


class Watched(Link):
    """Notes the forwards that go by."""

    def __init__(self, inner: Link, forwards: list[m.ForwardRequest]) -> None:
        self._inner = inner
        self._forwards = forwards

    def exchange(self, request: m.Request[m.R]) -> m.R:
        if isinstance(request, m.ForwardRequest):
            self._forwards.append(request)
        return self._inner.exchange(request)

    def close(self) -> None:
        self._inner.close()


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_trunk_that_forgets_is_told_again_and_no_number_changes(pieces: int) -> None:
    run = run_of()
    run = replace(run, train=replace(run.train, micro_batches=pieces))
    with world(TINY, run) as here:
        expected = numbers(here, trained(here.add("alice"), EPOCHS))
    with world(TINY, run) as here:
        link = Forgetful(here)
        losses, weights = numbers(here, trained(here.add("alice", link), EPOCHS))
    assert link.brought == pieces * (len(EPOCHS) - 3)
    assert losses == expected[0]
    assert same(weights, expected[1])


def test_a_step_that_is_repeated_goes_by_what_was_before_it(expected: Numbers) -> None:
    with world(TINY, run_of()) as here:
        alice = here.add("alice")
        losses = []
        with alice.trunk.session():
            for seed in EPOCHS:
                first_call = alice.trunk.next_call
                with alice.trunk.examples(batch(seed).examples_B):
                    alice.model(**batch(seed).inputs, labels=batch(seed).labels).loss.backward()
                alice.trunk.open(first_call=first_call)
                losses.append(alice.trainer.step([batch(seed)]).loss)
        assert losses == expected[0]
        assert same(numbers(here, losses)[1], expected[1])


def test_a_forward_that_is_made_again_goes_by_the_same(expected: Numbers) -> None:
    gradients = []
    for stash_bytes in (1 << 30, 1):
        with world(TINY, run_of(stash_bytes=stash_bytes)) as here:
            alice = here.add("alice")
            trained(alice, EPOCHS[:3])
            alice.trunk.open()
            losses = []
            for seed in (1, 0):
                with alice.trunk.examples(batch(seed).examples_B):
                    inputs, labels = batch(seed).inputs, batch(seed).labels
                    losses.append(alice.model(**inputs, labels=labels).loss)
            for loss in losses:
                loss.backward()
            names, found = (lambda r: (r.names, r.gradients))(alice.trunk.gradients(tensors=True))
            gradients.append(dict(zip(names, found, strict=True)))
    assert same(*gradients)


JOIN = JoinInfo(client="alice", round=1, address="", token="", config="", tokenizer="", run_id="")


def test_history_outlives_a_process(tmp_path: Path, expected: Numbers) -> None:
    run = run_of()
    run = replace(run, train=replace(run.train, save_every=1))
    with world(TINY, run) as here:
        first = here.add("alice")
        losses = trained(first, EPOCHS[:4])
        memory = Memory(id=7, history=dict(first.trunk.encoder_state))
        context = RecordDict()
        memory.put_into(context)
        memory.save(tmp_path, JOIN, run)
        for kept in (Memory.of(context), Memory.restore(tmp_path, 7, run)):
            assert same(kept.history, dict(first.trunk.encoder_state))
        second = here.add("alice", encoder_state=memory.history)
        second.model.load_state_dict(first.model.state_dict())
        second.trainer.steps = first.trainer.steps
        losses += trained(second, EPOCHS[4:])
    assert losses == expected[0]


def test_who_came_first_is_kept_as_long_as_there_is_room() -> None:
    with world(TINY, run_of(history_bytes=3 * ROW_BYTES)) as here:
        forwards: list[m.ForwardRequest] = []
        link = LocalLink(here.service, here.service.admit("alice"))
        alice = here.add("alice", Watched(link, forwards))
        trained(alice, [0, 1, 2, 0, 1, 2])
        assert {name.split("/")[0] for name in alice.trunk.encoder_state} == {"0", "1", "2"}
    bases = [None if each.bases_B is None else each.bases_B.tolist() for each in forwards]
    assert bases[:3] == [[NEW, NEW], [NEW, UNKEPT], None]
    assert bases[3] is not None and min(bases[3]) > NEW
    assert bases[4] is not None and bases[4][0] > NEW and bases[4][1] == UNKEPT
    assert bases[5] is None


def test_a_history_that_holds_no_example_is_refused() -> None:
    with world(TINY, run_of(history_bytes=ROW_BYTES - 1)) as here:
        with pytest.raises(ConfigError, match="history_bytes=767 holds no example.*takes 768"):
            trained(here.add("alice"), [0])


def test_a_forward_of_no_examples_goes_whole() -> None:
    with world(TINY, run_of()) as here:
        alice = here.add("alice")
        with alice.trunk.session():
            for _ in range(2):
                alice.model(**batch().inputs, labels=batch().labels).loss.backward()
                alice.trunk.step(step=0, num_tokens=1, client_sq_norm=0.0)
            assert not alice.trunk.encoder_state
            with pytest.raises(ProtocolError, match="3 examples were named for 2 sequences"):
                with alice.trunk.examples(torch.arange(3)):
                    alice.model(**batch().inputs)


# --- the trunk's side ----------------------------------------------------------------------------


def forward_by(*bases: Reference | int, brought: Sequence[Reference] = ()) -> m.ForwardRequest:
    names = [base if isinstance(base, int) else base.name for base in bases]
    sides = [[base.up_TD for base in brought], [base.down_TD for base in brought]]
    return m.ForwardRequest(
        session="s",
        call=0,
        training=True,
        smashed_BTD=torch.ones(len(names), 3, 4),
        bases_B=torch.tensor(names),
        references=tuple(torch.stack(side) for side in sides if side),
    )


def base_of(value: float) -> Reference:
    return Reference.of(torch.full((3, 4), value), torch.full((3, 4), -value))


def test_what_is_not_there_is_asked_for_and_what_is_brought_must_be_it() -> None:
    decoder = DeltaDecoder(1000)
    with pytest.raises(HistoryLost, match="1 of 2 sequences are deltas to activations"):
        decoder.decode("alice", forward_by(NEW, base_of(5)))
    with pytest.raises(BadTensor, match="1 of 1 sequences are not those that"):
        decoder.decode("alice", forward_by(base_of(5), brought=[base_of(4)]))
    forward = decoder.decode("alice", forward_by(base_of(5), brought=[base_of(5)]))
    assert forward.whole.smashed_BTD.eq(6).all()
    assert forward.whole.bases_B is None and forward.whole.references == ()


def test_of_one_client_those_with_a_successor_go_first_and_then_the_oldest() -> None:
    decoder = DeltaDecoder(3 * base_of(0).num_bytes)

    def answered(before: Reference | int, value: float) -> Reference:
        """A forward whose input arrives as `value`, and its output as `-value`."""
        was = 0.0 if isinstance(before, int) else float(before.up_TD[0, 0])
        request = replace(forward_by(before), smashed_BTD=torch.full((1, 3, 4), value - was))
        reply = m.ForwardReply(trunk_out_BTD=torch.full((1, 3, 4), -value), version=0, codec="bf16")
        decoder.decode("alice", request).encode(reply)
        return base_of(value)

    one, two, three = (answered(NEW, value) for value in (1.0, 2.0, 3.0))
    successor = answered(two, 4.0)
    decoder.decode("alice", forward_by(one, three, successor))
    with pytest.raises(HistoryLost):
        decoder.decode("alice", forward_by(two))
    full = f"{3 * base_of(0).num_bytes} of {3 * base_of(0).num_bytes}"
    assert decoder.in_use() == {"histories": full, "wire.history_bytes": full}
    answered(NEW, 5.0)
    with pytest.raises(HistoryLost):
        decoder.decode("alice", forward_by(one))
    decoder.decode("alice", forward_by(three, successor))
    answered(UNKEPT, 6.0)
    decoder.decode("alice", forward_by(three, successor))
    with pytest.raises(HistoryLost):
        decoder.decode("bob", forward_by(three))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda: WireSpec(history_bytes=1), "wire.up=none and wire.down=none"),
        (lambda: WireSpec(up="int8", history_bytes=1), "wire.down=none; set both"),
        (lambda: WireSpec(up="int8", down="int8", history_bytes=-1), "history_bytes"),
        (
            lambda: RunSpec(wire=WIRE, train=TrainSpec(mode="frozen_trunk")),
            "wire.history_bytes goes by the trunk's steps",
        ),
    ],
)
def test_what_cannot_go_together_is_refused(change: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        change()  # type: ignore[operator]
