"""What saves memory or time changes no number, or only their last digits."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedModel

from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.client.unsplit import NoTrunk
from fedsplit.errors import ConfigError
from fedsplit.link import LocalLink
from fedsplit.model import connect, initial_parts, join_model
from fedsplit.model.acceleration import apply_training_options
from fedsplit.model.attention import attention_of
from fedsplit.model.build import initial_whole
from fedsplit.model.compiling import compile_blocks
from fedsplit.model.describe import config_of, parts_of
from fedsplit.model.lora import add_adapters
from fedsplit.spec import LoraSpec, ModelSpec, SplitSpec, TrainSpec, WireSpec
from fedsplit.trunk.service import TrunkService
from tests.core.worlds import batch, same, small_run, world

# torch's compiler, when it is imported, uses what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")

DROPOUT = dict(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
PARTS = ("trunk", "client", "all")


def run_with(*, model=None, train=None, **changes):
    run = small_run(**changes)
    return replace(
        run, train=replace(run.train, **(train or {})), model=replace(run.model, **(model or {}))
    )


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trained(config, run, *, clients=1, link=LocalLink):
    """Weights of trunk and clients after three steps of all clients at once, and their bytes."""
    names = [f"client-{i}" for i in range(clients)]
    with world(config, run) as here:
        members = [here.add(n, link(here.service, here.service.admit(n))) for n in names]
        with ThreadPoolExecutor() as pool:
            groups = [[[batch(i), batch(i + 10)] for i in range(3)] for _ in members]
            fits = pool.map(lambda each, group: each.trainer.fit(group), members, groups)
            peaks = [stats.peak_bytes for stats in fits]
        trunk = weights(here.parts.trunk)
        return [trunk, *(weights(each.model) for each in members)], peaks


def largest_gap(ours, theirs):
    return max(
        (a[k] - b[k]).abs().max().item() for a, b in zip(ours, theirs, strict=True) for k in a
    )


# --- attention ----------------------------------------------------------------------------------


class Plain(PreTrainedModel):
    """A family with one attention."""


FLASH = ModelSpec(attention="flash_attention_2")
HALF = replace(FLASH, autocast="bfloat16")


@pytest.mark.parametrize(("family", "name"), [(GPT2LMHeadModel, "sdpa"), (Plain, "eager")])
def test_auto_takes_the_fastest_attention_that_the_family_has(family, name):
    assert attention_of(ModelSpec(attention="auto"), family) == name


@pytest.mark.parametrize(
    ("model", "family", "device", "reason"),
    [
        (ModelSpec(attention="sdpa"), Plain, "cpu", "Plain does not support it"),
        (FLASH, Plain, "cuda", "Plain does not support it"),
        (HALF, GPT2LMHeadModel, "cpu", "needs a CUDA device, and this part is on cpu"),
        (FLASH, GPT2LMHeadModel, "cuda:0", "needs half precision"),
        (HALF, GPT2LMHeadModel, "cuda:0", "the package flash-attn is not installed here"),
    ],
)
def test_an_attention_that_cannot_be_is_refused_with_the_reason(model, family, device, reason):
    with pytest.raises(
        ConfigError, match=f"model.attention={model.attention} cannot be: .*{reason}"
    ):
        attention_of(model, family, device)


def test_a_run_says_what_attention_its_parts_compute_with(caplog):
    config = dict(n_layer=4, n_embd=16, n_head=2, vocab_size=64)
    run = small_run(model=ModelSpec(attention="auto", config=config))
    with caplog.at_level(logging.INFO):
        parts = parts_of(run, config_of(run, None))
    assert parts.trunk.config._attn_implementation == "sdpa"
    assert "GPT2LMHeadModel on cpu computes attention as sdpa" in caplog.text


# --- checkpointing ------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [{}, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("parts", PARTS)
def test_checkpointing_changes_no_number(tiny_gpt2, parts, dropout):
    config = tiny_gpt2(**dropout)
    kept, peak = trained(config, run_with())
    again, peak_again = trained(config, run_with(train={"checkpointing": parts}))
    assert all(map(same, kept, again))
    assert (peak_again < peak) == (parts != "trunk")


def test_clients_that_compute_again_at_once_do_not_disturb_each_others_dropout(tiny_gpt2):
    config = tiny_gpt2(**DROPOUT)
    kept, _ = trained(config, run_with(), clients=3)
    again, _ = trained(config, run_with(train={"checkpointing": "all"}), clients=3)
    assert all(map(same, kept, again))


def adapted(config, run):
    """A client's and a trunk's weights after three steps with adapters."""
    parts = initial_parts(config, run.split, run.seed)
    for part in (parts.client, parts.trunk):
        add_adapters(part, run.lora, run.seed)
    with TrunkService(parts.trunk, run) as service:
        link = LocalLink(service, service.admit("alice"))
        trunk = RemoteTrunk(link, parts.client, run, client="alice")
        connect(parts.client, trunk)
        ClientTrainer(parts.client, trunk, run).fit([batch(i)] for i in range(3))
    return weights(parts.client), weights(parts.trunk)


@pytest.mark.parametrize("lora", [{"dropout": 0.3}, {"bottom": False, "top": False}], ids=str)
def test_checkpointing_goes_with_adapters(tiny_llama, lora):
    spec = LoraSpec(enabled=True, rank=2, alpha=4, **lora)
    kept = adapted(tiny_llama(), run_with(lora=spec))
    again = adapted(tiny_llama(), run_with(lora=spec, train={"checkpointing": "all"}))
    assert all(map(same, kept, again))


def test_checkpointing_the_trunk_keeps_less_there(tiny_llama):
    def stashed(run):
        with world(tiny_llama(), run) as here:
            alice = here.add("alice")
            with alice.trunk.session():
                alice.model.train()(**batch().inputs)
                return here.service.engine.stashed_bytes

    assert stashed(run_with(train={"checkpointing": "trunk"})) < 0.5 * stashed(run_with())


def test_a_family_that_cannot_is_refused():
    class Stubborn:
        supports_gradient_checkpointing = False

    with pytest.raises(ConfigError, match="Stubborn does not support activation checkpointing"):
        apply_training_options(Stubborn(), TrainSpec(checkpointing="all"))


# --- precision ----------------------------------------------------------------------------------


class Noting(LocalLink):
    """A link that notes the dtypes of what crosses it."""

    seen: set[torch.dtype] = set()

    def exchange(self, request):
        reply = super().exchange(request)
        for message in (request, reply):
            fields = (getattr(message, name) for name in message.__dataclass_fields__)
            self.seen.update(t.dtype for t in fields if isinstance(t, torch.Tensor))
        return reply


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_split_model_under_autocast_is_the_unsplit_one_under_autocast(
    tiny_gpt2, tiny_llama, family
):
    config = {"gpt2": tiny_gpt2, "llama": tiny_llama}[family]()
    run = run_with(model={"autocast": "bfloat16"})
    with world(config, run) as here:
        alice = here.add("alice")
        whole = join_model(alice.model, here.parts.trunk)
        judge = ClientTrainer(whole, NoTrunk(whole, client="alice"), run)
        groups = [[batch(i), batch(i + 10)] for i in range(3)]
        assert alice.trainer.fit(groups).loss == pytest.approx(judge.fit(groups).loss, abs=1e-6)
        ours, theirs = (each.evaluate([batch(50)]).nats for each in (alice.trainer, judge))
        assert ours == pytest.approx(theirs, abs=1e-4)
        after = join_model(alice.model, here.parts.trunk)
    assert largest_gap([weights(after)], [weights(whole)]) < 1e-5


def test_autocast_is_near_full_precision_and_the_wire_does_not_see_it(tiny_llama):
    full, _ = trained(tiny_llama(), run_with())
    Noting.seen = set()
    half, _ = trained(tiny_llama(), run_with(model={"autocast": "bfloat16"}), link=Noting)
    assert 0 < largest_gap(full, half) < 2e-3
    assert torch.bfloat16 not in Noting.seen and torch.float32 in Noting.seen
    assert all(p.dtype == torch.float32 for part in half for p in part.values())


def test_autocast_and_checkpointing_go_together(tiny_gpt2):
    config, model = tiny_gpt2(**DROPOUT), {"autocast": "bfloat16"}
    kept, _ = trained(config, run_with(model=model))
    again, _ = trained(config, run_with(model=model, train={"checkpointing": "all"}))
    assert all(map(same, kept, again))


# --- compilation --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_trunk_is_near_one_that_is_not_and_compiles_once(tiny_llama):
    from torch._dynamo.utils import counters

    plain, _ = trained(tiny_llama(), run_with())
    torch._dynamo.reset()
    counters.clear()
    train = {"compile_trunk": "default", "checkpointing": "trunk"}
    # A compiler on a busy machine may take minutes.
    wire = WireSpec(budget_s=600.0, call_deadline_s=600.0)
    compiled, _ = trained(tiny_llama(), run_with(train=train, wire=wire))
    assert largest_gap(plain, compiled) < 1e-6
    assert counters["stats"]["unique_graphs"] == 1, "for both blocks, each version, and both passes"


@pytest.mark.slow
def test_a_part_that_cannot_be_compiled_says_so_once_and_runs(tiny_llama, caplog):
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    trunk = initial_parts(tiny_llama(), SplitSpec.parse("1/*/1"), 0).trunk.train()
    smashed_BTD = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    expected_BTD = trunk.run(smashed_BTD)
    compile_blocks(trunk, "default")
    with fresh_cache(), config.patch({"cpp.cxx": ("no-such-compiler",)}):
        found = [trunk.run(smashed_BTD) for _ in range(2)]
    assert all(torch.equal(each_BTD, expected_BTD) for each_BTD in found)
    (warning,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert "LlamaForCausalLM runs without torch.compile, which failed" in warning.getMessage()


@pytest.mark.parametrize("part", ["client", "trunk", "whole"])
def test_without_gradients_nothing_is_compiled(tiny_llama, part):
    from torch._dynamo.utils import counters

    split = SplitSpec.parse("1/*/1")
    parts = initial_parts(tiny_llama(), split, 0)
    models = {"client": parts.client, "trunk": parts.trunk, "whole": initial_whole(tiny_llama(), 0)}
    counters.clear()
    apply_training_options(
        models[part], TrainSpec(compile_client="default", compile_trunk="default")
    )
    with torch.no_grad():
        parts.client(**batch().inputs)
        models["whole"](**batch().inputs)
    assert not counters["frames"]
    replaced = [name for name, each in models[part].named_modules() if "forward" in vars(each)]
    assert len(replaced) == {"client": 2, "trunk": 2, "whole": 4}[part]
