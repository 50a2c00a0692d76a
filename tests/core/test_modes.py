"""What each mode trains, and what crosses the wire for it: exactly that and nothing else."""

import copy
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor
from transformers import BertForSequenceClassification

from fedsplit.client.objective import ClientObjective
from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.data import TASKS, Batch
from fedsplit.errors import ConfigError
from fedsplit.link import LocalLink
from fedsplit.model import SplitModel, connect, initial_parts, join_model
from fedsplit.model.auxiliary import add_auxiliary_head, auxiliary_head_of
from fedsplit.model.lora import add_adapters, trainable
from fedsplit.optimization import PartOptimizer, clip_coefficient
from fedsplit.spec import LoraSpec
from fedsplit.trunk.service import TrunkService
from fedsplit.wire import messages as m
from simulations.tiny import tiny_config
from strategies.local_loss import LocalObjective
from tests.core.worlds import batch, same, small_run

MODES = ("joint", "frozen_trunk", "isolated")
GROUPS = [[batch(0), batch(1, pad=4)], [batch(2)]]


class Recorder(LocalLink):
    """A link that writes down which requests cross, and the bytes of the tensors in them."""

    def __init__(self, service, token):
        super().__init__(service, token)
        self.kinds, self.num_bytes = [], 0

    def exchange(self, request):
        reply = super().exchange(request)
        self.kinds.append(type(request))
        for message in (request, reply):
            values = (getattr(message, field.name) for field in fields(message))
            self.num_bytes += sum(v.nbytes for v in values if isinstance(v, Tensor))
        return reply


@dataclass
class Halves:
    parts: SplitModel
    service: TrunkService
    link: Recorder
    trainer: ClientTrainer

    def weights(self):
        everything = (*self.parts.client.named_parameters(), *self.parts.trunk.named_parameters())
        return {name: p.detach().clone() for name, p in everything}


def run_in(mode, **changes):
    base = small_run(**changes)
    return replace(base, train=replace(base.train, mode=mode, clip_norm=0.5))


@contextmanager
def halves(config, run, **options):
    parts = initial_parts(config, run.split, run.seed, **options)
    for part in (parts.client, parts.trunk):
        add_adapters(part, run.lora, run.seed)
    if run.train.mode != "joint":
        parts.trunk.requires_grad_(False)
    if run.train.mode == "isolated":
        add_auxiliary_head(parts.client, run.task, run.seed)
    objective = LocalObjective if run.train.mode == "isolated" else ClientObjective
    with TrunkService(parts.trunk, run) as service:
        link = Recorder(service, service.admit("alice"))
        trunk = RemoteTrunk(link, parts.client, run, client="alice")
        connect(parts.client, trunk)
        trainer = ClientTrainer(parts.client, trunk, run, objective=objective)
        yield Halves(parts, service, link, trainer)


@pytest.fixture(params=["tied", "untied"])
def config(request, tiny_gpt2, tiny_llama):
    """GPT-2's head is its embedding, Llama's is a matrix of its own."""
    return tiny_gpt2() if request.param == "tied" else tiny_llama()


@pytest.mark.parametrize("mode", MODES)
def test_exactly_these_parameters_move(config, mode):
    with halves(config, run_in(mode)) as here:
        before = here.weights()
        here.trainer.fit(GROUPS)
        after = here.weights()
        version = here.service.engine.version
    client = {name for name, _ in here.parts.client.named_parameters()}
    trunk = set(before) - client
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == (client | trunk if mode == "joint" else client)
    assert any(name.startswith("auxiliary.") for name in moved) == (mode == "isolated")
    assert version == (len(GROUPS) if mode == "joint" else 0)


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_are_whole_batches(config, mode):
    found = []
    for number in (1, 2, 2):
        run = run_in(mode)
        run = replace(run, train=replace(run.train, micro_batches=number))
        with halves(config, run) as here:
            here.trainer.fit(GROUPS)
            found.append(here.weights())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-6, rtol=0, msg=name)
    assert same(found[1], found[2])


@pytest.mark.parametrize("mode", ["frozen_trunk", "isolated"])
def test_with_adapters_only_those_of_the_client_move(tiny_llama, mode):
    with halves(tiny_llama(), run_in(mode, lora=LoraSpec(enabled=True, rank=2))) as here:
        before = here.weights()
        here.trainer.fit(GROUPS)
        after = here.weights()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    wanted = trainable(here.parts.client)
    assert moved == set(wanted)
    assert all("lora_" in name or name.startswith("auxiliary.") for name in moved)


def test_an_isolated_classifier_learns_at_both_ends():
    run = run_in("isolated", task="sequence_classification")
    config = tiny_config("bert", num_hidden_layers=4, num_labels=2)
    rows, labels_B = batch(0).inputs, torch.tensor([0, 1])
    each = Batch(inputs=rows, labels=labels_B, num_tokens=2, num_bytes=0)
    with halves(config, run, model_class=BertForSequenceClassification) as here:
        before = here.weights()
        first = here.trainer.fit([[each]])
        here.trainer.fit([[each]] * 40)
        after = here.weights()
        last = here.trainer.evaluate([each])
        with here.trainer._trunk.session():
            here.parts.client(**rows)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name, _ in here.parts.client.named_parameters()}
    assert last.nats / last.num_tokens < 0.5 * first.loss
    assert last.counts["correct"] == 2
    guess = auxiliary_head_of(here.parts.client)(rows["attention_mask"])
    assert torch.equal(guess.argmax(dim=-1), labels_B)


# --- the unsplit model in the same mode ------------------------------------------------------


def trained_unsplit(parts, run, groups):
    """An ordinary loop on the unsplit model; its weights, and those of the auxiliary head."""
    mode = run.train.mode
    whole = join_model(parts.client, parts.trunk).train()
    blocks = whole.get_submodule(parts.client.plan.blocks)
    mine = dict(whole.named_parameters())
    for name, _ in parts.trunk.named_parameters():
        mine.pop(name).requires_grad_(False)
    noted = []
    if mode == "isolated":
        head = copy.deepcopy(auxiliary_head_of(parts.client))
        mine |= {f"auxiliary.{name}": p for name, p in head.named_parameters()}
        blocks[0].register_forward_hook(lambda block, args, out: noted.append(tensor_of(out)))
        blocks[2].register_forward_hook(lambda block, args, out: detached(out))
    optimizer = PartOptimizer(mine, run.train)
    for step, group in enumerate(groups):
        total = sum(each.num_tokens for each in group)
        for each in group:
            loss = whole(**each.inputs, labels=each.labels).loss
            if mode == "isolated":
                head.note(head, (noted.pop(),))
                loss = loss + TASKS[run.task].loss(head(), each.labels)
            (loss * (each.num_tokens / total)).backward()
        optimizer.step(step, clip_coefficient(optimizer.sq_norm(), run.train.clip_norm))
    return {name: p.detach() for name, p in mine.items()}


def tensor_of(out):
    return out[0] if isinstance(out, tuple) else out


def detached(out):
    return tuple(o.detach() for o in out) if isinstance(out, tuple) else out.detach()


@pytest.mark.parametrize("mode", ["frozen_trunk", "isolated"])
def test_the_client_trains_as_the_unsplit_model_in_this_mode(config, mode):
    run = run_in(mode)
    with halves(config, run) as here:
        wanted = trained_unsplit(here.parts, run, GROUPS)
        here.trainer.fit(GROUPS)
    found = {name: p.detach() for name, p in here.parts.client.named_parameters()}
    assert same(found, wanted)


def test_a_tied_head_learns_from_both_losses(tiny_gpt2):
    with halves(tiny_gpt2(), run_in("isolated")) as here:
        client, head = here.parts.client, auxiliary_head_of(here.parts.client)
        table = client.get_input_embeddings().weight
        assert client.get_output_embeddings().weight is table
        each, trunk = batch(0), here.trainer._trunk
        with trunk.session():
            top_alone = torch.autograd.grad(client(**each.inputs, labels=each.labels).loss, table)
            loss = TASKS["causal_lm"].loss(head(), each.labels)
            bottom_alone = torch.autograd.grad(loss, table)
            here.trainer._one_batch(each, each.num_tokens)
    torch.testing.assert_close(table.grad, top_alone[0] + bottom_alone[0])
    assert top_alone[0].count_nonzero() > 0
    assert bottom_alone[0].count_nonzero() > 0


# --- what crosses ----------------------------------------------------------------------------

BOTH_WAYS = [m.ForwardRequest, m.BackwardRequest]
CALLS = {
    "joint": [*BOTH_WAYS * 2, m.StepRequest, *BOTH_WAYS, m.StepRequest],
    "frozen_trunk": BOTH_WAYS * 3,
    "isolated": [m.ForwardRequest] * 3,
}


@pytest.mark.parametrize("mode", MODES)
def test_these_calls_cross(tiny_llama, mode):
    with halves(tiny_llama(), run_in(mode)) as here:
        here.trainer.fit(GROUPS)
        assert here.service.engine.stashed_bytes == 0
    assert here.link.kinds == [m.OpenRequest, *CALLS[mode], m.CloseRequest]


def test_isolated_halves_the_traffic(tiny_llama):
    def crossed(mode):
        with halves(tiny_llama(), run_in(mode)) as here:
            here.trainer.fit([[batch(i)] for i in range(3)])
        return here.link.num_bytes

    bytes_of = {mode: crossed(mode) for mode in MODES}
    assert bytes_of["joint"] == bytes_of["frozen_trunk"] == 3 * 4 * (2 * 12 * 16 * 4)
    assert bytes_of["isolated"] == bytes_of["joint"] / 2


@pytest.mark.parametrize("mode", ["frozen_trunk", "isolated"])
def test_nobody_waits_for_anybody(tiny_llama, mode):
    with halves(tiny_llama(), run_in(mode)) as here:
        idle = LocalLink(here.service, here.service.admit("bob"))
        with RemoteTrunk(idle, here.parts.client, here.trainer._run, client="bob").session():
            assert here.trainer.fit(GROUPS).steps == 2, "a barrier would wait for bob's step"


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (LocalObjective, "train.mode=isolated trains the bottom on an auxiliary head, but this"),
        (ClientObjective, "but ClientObjective has no such loss; use strategy=local_loss"),
    ],
    ids=["no head", "no local loss"],
)
def test_isolated_needs_a_loss_for_the_bottom(tiny_llama, objective, message):
    run = run_in("isolated")
    parts = initial_parts(tiny_llama(), run.split, run.seed)
    with TrunkService(parts.trunk, run) as service:
        link = LocalLink(service, service.admit("alice"))
        trunk = RemoteTrunk(link, parts.client, run, client="alice")
        with pytest.raises(ConfigError, match=message):
            ClientTrainer(parts.client, trunk, run, objective=objective)


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_is_alike_in_every_mode(tiny_llama, mode):
    with halves(tiny_llama(), run_in(mode)) as here:
        whole = join_model(here.parts.client, here.parts.trunk).eval()
        stats = here.trainer.evaluate([batch(3)])
    loss = whole(**batch(3).inputs, labels=batch(3).labels).loss.item()
    assert stats.nats == pytest.approx(loss * stats.num_tokens, rel=1e-6)
