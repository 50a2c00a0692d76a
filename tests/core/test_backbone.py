"""What calls a client's model beside a training step: manual loops, other libraries, odd arguments.

The unsplit model judges them all.
"""

import copy
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import DynamicCache, StaticCache

from fedsplit.errors import ConfigError, ProtocolError, UnsupportedModel
from fedsplit.model import connect, split_model
from fedsplit.wire.messages import ForwardRequest, GenerateRequest, OpenRequest
from simulations.families import random_model
from simulations.tiny import tiny_config
from tests.core.generating import generated, parts_of, prompt, scene, whole_of


def eager(model_type, num_hidden_layers=6, **fields):
    config = tiny_config(model_type, num_hidden_layers=num_hidden_layers, **fields)
    return random_model(config, attn_implementation="eager")


# --- the outputs of layers ------------------------------------------------------------------------

# bloom and falcon collect outputs themselves; the others leave it to transformers.
COLLECTING = ["gpt2", "llama", "gemma2", "opt", "olmoe", "bloom", "falcon"]


@pytest.mark.parametrize("family", COLLECTING)
@pytest.mark.parametrize("split", ["2/3/1", "1/1/4"])
def test_an_index_refers_to_the_same_layer(family, split):
    whole, ids_BT = eager(family), prompt(rows=2)
    client = split_model(whole, split).client
    bottom, end = client.trunk_blocks.start, client.trunk_blocks.stop
    wanted = whole(ids_BT, output_hidden_states=True, output_attentions=True)
    found = client(ids_BT, output_hidden_states=True, output_attentions=True)
    assert len(found.hidden_states) == 7
    for i, (state, own) in enumerate(zip(wanted.hidden_states, found.hidden_states, strict=True)):
        assert own is None if bottom < i < end else torch.equal(own, state)
    for i, (weights, own) in enumerate(zip(wanted.attentions, found.attentions, strict=True)):
        assert own is None if bottom <= i < end else torch.equal(own, weights)
    assert torch.equal(found.logits, wanted.logits)


def test_layers_without_attention_have_no_entry():
    # Each block of linear attention is followed by one of full attention.
    whole, ids_BT = eager("qwen3_next", 4), prompt()
    wanted = whole(ids_BT, output_attentions=True).attentions
    found = split_model(whole, "1/2/1").client(ids_BT, output_attentions=True).attentions
    assert len(wanted) == len(found) == 2
    assert found[0] is None
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("selection", [-1, [1, -2], [0, 5, 99]])
def test_hidden_states_can_be_selected_by_index(selection):
    whole, ids_BT = eager("llama"), prompt()
    wanted = whole(ids_BT, output_hidden_states=selection).hidden_states
    found = split_model(whole, "2/2/2").client(ids_BT, output_hidden_states=selection).hidden_states
    assert [each is None for each in found] == [each is None for each in wanted]
    pairs = zip(wanted, found, strict=True)
    assert all(a is None or torch.equal(a, b) for a, b in pairs)


def test_a_tuple_has_the_outputs_of_the_unsplit_model():
    whole, ids_BT = eager("llama"), prompt()
    client = split_model(whole, "2/2/2").client
    for options in ({"return_dict": False}, {"return_dict": False, "output_hidden_states": True}):
        wanted, found = whole(ids_BT, **options), client(ids_BT, **options)
        assert len(found) == len(wanted)
        assert torch.equal(found[0], wanted[0])


# --- the cache that a forward returns -------------------------------------------------------------


def loop(model, ids_BT, steps=4):
    """The logits of a manual loop that decodes greedily from the cache of the last forward."""
    out, logits = model(ids_BT), []
    for _ in range(steps):
        logits.append(out.logits[:, -1])
        next_B1 = out.logits[:, -1:].argmax(-1)
        out = model(next_B1, past_key_values=out.past_key_values)
    return torch.stack(logits)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "falcon", "gemma2", "olmoe", "lfm2"])
def test_a_manual_loop_decodes_from_the_cache_that_it_gets(family, grad):
    ids_BT = prompt(9, rows=2)
    with scene(family) as here, torch.set_grad_enabled(grad):
        alice = here.client()
        alice.remote.open(training=False)
        wanted = loop(here.whole, ids_BT)
        torch.testing.assert_close(loop(alice.model, ids_BT), wanted)
        assert len(alice.sent(ForwardRequest)) == 1
        torch.testing.assert_close(loop(parts_of(family).client, ids_BT), wanted)


def test_a_returned_cache_can_be_copied_and_cropped_before_its_first_use():
    ids_1T, ends = prompt(9), [prompt(2, seed=seed) for seed in (1, 2)]
    with scene("llama") as here, torch.no_grad():
        alice = here.client()
        alice.remote.open(training=False)
        cache = alice.model(ids_1T).past_key_values
        for end_1T in ends:
            own = copy.deepcopy(cache)
            own.crop(-1)
            found = alice.model(end_1T, past_key_values=own).logits
            wanted = here.whole(torch.cat([ids_1T[:, :-1], end_1T], dim=1)).logits[:, -2:]
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_empty_cache_of_transformers_is_taken(family):
    ids_1T = prompt(9)
    with scene(family) as here:
        alice = here.client()
        caches = [DynamicCache(config=here.whole.config), DynamicCache()]
        for cache in caches:
            asked = {"past_key_values": cache, "attention_mask": torch.ones_like(ids_1T)}
            assert torch.equal(alice.says(ids_1T, **asked), here.wanted(ids_1T))
            assert cache.get_seq_length() == 9 + 8 - 1


def test_a_static_cache_of_transformers_is_refused_with_the_way_out():
    client = parts_of("llama").client
    cache = StaticCache(config=client.config, max_cache_len=16)
    told = r"StaticCache that was made elsewhere.* pass model.new_cache\(max_length=...\)"
    with torch.no_grad(), pytest.raises(UnsupportedModel, match=told):
        client(prompt(), past_key_values=cache)
    out = client(prompt(), past_key_values=client.new_cache(max_length=16))
    assert torch.equal(out.logits, whole_of("llama")(prompt()).logits)


def test_a_forward_without_a_second_one_opens_no_cache_at_the_trunk():
    ids_BT = prompt(9, rows=2)
    with scene("llama") as here:
        alice = here.client()
        alice.remote.open()
        alice.model.train()
        loss = alice.model(ids_BT, labels=ids_BT).loss
        loss.backward()
        with torch.no_grad():
            alice.model(ids_BT, labels=ids_BT)
        assert len(alice.sent(OpenRequest)) == 1
        assert not alice.sent(GenerateRequest)
        assert [request.training for request in alice.sent(ForwardRequest)] == [True, False]
        here.whole(ids_BT, labels=ids_BT).loss.backward()
        wanted = dict(here.whole.named_parameters())
        assert all(torch.equal(p.grad, wanted[n].grad) for n, p in alice.model.named_parameters())
        here.whole.zero_grad()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_there_is_a_cache_where_the_family_returns_one(family):
    whole, ids_BT = copy.deepcopy(whole_of(family)), prompt()
    client = copy.deepcopy(parts_of(family).client)

    def kinds(**options):
        return [model(ids_BT, **options).past_key_values is None for model in (whole, client)]

    assert kinds() == [False, False]
    assert kinds(use_cache=False) == [True, True]
    for model in (whole, client):
        model.config.use_cache = False
    assert kinds() == [True, True]
    assert kinds(use_cache=True) == [False, False]
    for model in (whole, client):
        model.gradient_checkpointing_enable()
        model.train()
    assert kinds(use_cache=True) == [True, True]


# --- the backbone alone ---------------------------------------------------------------------------

BACKBONES = {
    "base_model": lambda model: model.base_model,
    "decoder": lambda model: model.get_decoder(),
}


@pytest.mark.parametrize("place", BACKBONES)
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bloom", "olmoe"])
def test_a_backbone_called_by_others_reaches_the_trunk(family, place):
    whole, parts = copy.deepcopy(whole_of(family)), copy.deepcopy(parts_of(family))
    ids_BT = prompt(rows=2, pad=3)
    mask_BT = (ids_BT != 0).long()
    results = []
    for model, members in ((whole, [whole]), (parts.client, [parts.client, parts.trunk])):
        states_BTD = BACKBONES[place](model)(ids_BT, attention_mask=mask_BT).last_hidden_state
        model.lm_head(states_BTD).square().mean().backward()
        gradients = {n: p.grad for m in members for n, p in m.named_parameters()}
        results.append((states_BTD, gradients))
    (wanted, gradients), (found, own) = results
    assert torch.equal(found, wanted)
    assert gradients.keys() == own.keys()
    assert all(torch.equal(own[name], gradients[name]) for name in gradients)


def test_a_backbone_without_a_head_is_its_own_model():
    whole = random_model(tiny_config("llama", num_hidden_layers=4)).model
    client = split_model(whole, "1/2/1").client
    ids_BT = prompt()
    assert torch.equal(client(ids_BT).last_hidden_state, whole(ids_BT).last_hidden_state)
    torch.testing.assert_close(
        client(ids_BT[:, -1:], past_key_values=client(ids_BT[:, :-1]).past_key_values)[0],
        whole(ids_BT)[0][:, -1:],
    )


def test_a_classifier_of_a_pooled_backbone_trains_as_the_unsplit_one():
    whole, parts = copy.deepcopy(whole_of("llama")), copy.deepcopy(parts_of("llama"))
    ids_BT, head = prompt(rows=2), nn.Linear(32, 3)
    losses = [head(m.base_model(ids_BT)[0][:, -1]).sum() for m in (whole, parts.client)]
    assert torch.equal(*losses)


# --- what works elsewhere works here, or is refused with the cause --------------------------------

MASK_4D = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
REFUSED = {
    "dict mask": (
        "gemma2",
        lambda m: m(prompt(), attention_mask={"full_attention": MASK_4D}),
        ConfigError,
        r"attention_mask is a dict; a split model takes one of padding, \[batch, tokens\]",
    ),
    "4-D mask": (
        "llama",
        lambda m: m(prompt(), attention_mask=MASK_4D),
        ConfigError,
        r"attention_mask has shape \(1, 1, 12, 12\); a split model takes one of padding",
    ),
    "router loss": (
        "olmoe",
        lambda m: m(prompt(), output_router_logits=True),
        ConfigError,
        "output_router_logits=True: the auxiliary loss needs the router logits of layers",
    ),
    "cross attention": (
        "gpt2",
        lambda m: m(prompt(), encoder_hidden_states=torch.zeros(1, 2, 32)),
        ConfigError,
        "encoder_hidden_states changes what the trunk's blocks compute",
    ),
    "direction": (
        "llama",
        lambda m: m(prompt(), is_causal=False),
        ConfigError,
        "is_causal=False: the trunk's attention is set by its config",
    ),
    "packing": (
        "llama",
        lambda m: m(prompt(), cu_seq_lens_q=torch.tensor([0, 12])),
        ConfigError,
        "cu_seq_lens_q changes what the trunk's blocks compute",
    ),
    "prefix tuning": (
        "llama",
        lambda m: get_peft_model(
            m, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        )(prompt()),
        UnsupportedModel,
        "the trunk takes no keys and values for its blocks; .* use LoRA or prompt tuning",
    ),
    "early exit": (
        "llama",
        lambda m: generated(m, prompt(), assistant_early_exit=1),
        ConfigError,
        "assistant_early_exit=1: the client cannot end a forward at a block of the trunk",
    ),
    "continuous batching": (
        "llama",
        lambda m: m.generate_batch([[5, 6, 7]]),
        ConfigError,
        "generate_batch keeps all keys and values in pages of this process",
    ),
    "static cache with ALiBi": (
        "bloom",
        lambda m: generated(m, prompt(), cache_implementation="static"),
        ConfigError,
        "BloomForCausalLM computes ALiBi from the length of the attention mask",
    ),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(("family", "call", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_what_the_trunk_cannot_do_is_refused_by_name(family, call, error, text):
    client = copy.deepcopy(parts_of(family).client)
    with pytest.raises(error, match=text):
        call(client)
    # The refusal leaves nothing behind.
    assert torch.equal(generated(client, prompt()), generated(whole_of(family), prompt()))


TAKEN = {
    "logits_to_keep": ("llama", {"input_ids": prompt(), "logits_to_keep": 2}),
    "inputs_embeds": ("llama", {"inputs_embeds": torch.linspace(-1, 1, 96).view(1, 3, 32)}),
    "token_type_ids": ("gpt2", {"input_ids": prompt(), "token_type_ids": prompt(seed=1)}),
    "position_ids": ("gpt2", {"input_ids": prompt(), "position_ids": torch.arange(3, 15)[None]}),
}


@pytest.mark.parametrize(("family", "named"), TAKEN.values(), ids=TAKEN)
def test_arguments_for_the_client_s_modules_are_taken(family, named):
    assert torch.equal(parts_of(family).client(**named).logits, whole_of(family)(**named).logits)


PACKED = {
    "cache": {},
    "no cache": {"use_cache": False},
    "mask": {"use_cache": False, "attention_mask": torch.ones(1, 12, dtype=torch.long)},
}


@pytest.mark.parametrize("options", PACKED.values(), ids=PACKED)
def test_positions_that_restart_mean_the_same_in_every_block(options):
    named = {"input_ids": prompt(), "position_ids": torch.arange(6).repeat(2)[None], **options}
    with scene("llama") as here, torch.no_grad():
        alice = here.client()
        alice.remote.open(training=False)
        assert torch.equal(alice.model(**named).logits, here.whole(**named).logits)


def test_no_gradient_passes_through_a_cache_over_a_link():
    with scene("llama") as here:
        alice = here.client()
        alice.remote.open()
        out = alice.model(prompt())
        again = alice.model(prompt(1), past_key_values=out.past_key_values)
        out.logits.sum().backward()
        with pytest.raises(ProtocolError, match="no gradient passes through a KV cache"):
            again.logits.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int32])
def test_a_mask_of_padding_may_have_any_dtype(dtype):
    ids_BT = prompt(rows=2, pad=3)
    with scene("llama") as here, torch.no_grad():
        alice = here.client()
        alice.remote.open(training=False)
        mask_BT = (ids_BT != 0).to(dtype)
        found = alice.model(ids_BT, attention_mask=mask_BT).logits
        assert torch.equal(found, here.whole(ids_BT, attention_mask=mask_BT).logits)
        assert torch.equal(
            alice.says(ids_BT, attention_mask=mask_BT), here.wanted(ids_BT, attention_mask=mask_BT)
        )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_prompt_tuning_gives_the_unsplit_model_s_logits():
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    logits = []
    for model in (whole_of("llama"), parts_of("llama").client):
        torch.manual_seed(0)
        logits.append(get_peft_model(copy.deepcopy(model), settings)(prompt()).logits)
    assert torch.equal(*logits)


def test_a_copy_of_a_client_has_a_trunk_of_its_own_or_none():
    ids_BT = prompt()
    client = copy.deepcopy(parts_of("llama").client)
    wanted, own = client(ids_BT).logits, copy.deepcopy(client)
    with torch.no_grad():
        for parameter in client.remote.connection.carry.__self__.parameters():
            parameter.zero_()
    assert torch.equal(own(ids_BT).logits, wanted)
    with scene("llama") as here:
        own = copy.deepcopy(here.client().model)
        with pytest.raises(ConfigError, match=r"a copy of a client has no trunk: call connect\("):
            own(ids_BT)
        connect(own, here.trunk.run)
        assert torch.equal(own(ids_BT).logits, wanted)


def test_a_part_can_be_pickled():
    ids_BT, parts = prompt(), parts_of("llama")
    again = ForkingPickler.loads(ForkingPickler.dumps(parts))
    assert torch.equal(again.client(ids_BT).logits, parts.client(ids_BT).logits)
    assert type(again.client).__name__ == "LlamaForCausalLM"
    with scene("llama") as here:
        alone = ForkingPickler.loads(ForkingPickler.dumps(here.client().model))
        with pytest.raises(ConfigError, match="a copy of a client has no trunk"):
            alone(ids_BT)


@pytest.mark.slow
def test_a_compiled_forward_generates_over_a_link():
    with scene("llama") as here:
        alice = here.client()
        alice.model.forward = torch.compile(alice.model.forward, backend="eager")
        assert torch.equal(alice.says(prompt()), here.wanted(prompt()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # one is untied, the other is tied
def test_a_model_without_memory_is_split_into_parts_without_memory(family):
    with torch.device("meta"):
        whole = type(whole_of(family))(tiny_config(family, num_hidden_layers=4))
    parts = split_model(whole, "1/2/1")
    shapes = {n: p.shape for m in (parts.client, parts.trunk) for n, p in m.named_parameters()}
    assert shapes == {name: p.shape for name, p in whole.named_parameters()}
    assert {p.device.type for m in (parts.client, parts.trunk) for p in m.parameters()} == {"meta"}
