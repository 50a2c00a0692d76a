"""The two parts of a model: what they hold, how they are connected, and that they stay exact."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import AutoModelForCausalLM

from fedsplit.errors import CheckpointError, ConfigError
from fedsplit.model import (
    build_client,
    build_trunk,
    connect,
    initial_parts,
    join_model,
    split_model,
)
from fedsplit.spec import SplitSpec
from simulations.families import batches, difference, random_model
from simulations.tiny import tiny_config

SPLIT = SplitSpec.parse("1/2/1")


def both(parts):
    return [parts.client, parts.trunk]


@pytest.fixture
def whole(tiny_llama):
    return random_model(tiny_llama(vocab_size=99))


@pytest.fixture
def ids_BT():
    return torch.randint(3, 60, (3, 14), generator=torch.Generator().manual_seed(1))


def test_each_tensor_of_the_whole_is_in_exactly_one_part(whole):
    parts = split_model(whole, SPLIT)
    state, ends, trunk = (m.state_dict() for m in (whole, parts.client, parts.trunk))
    assert set(ends) | set(trunk) == set(state)
    assert not set(ends) & set(trunk)
    assert {name.split(".")[2] for name in trunk} == {"1", "2"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in {**ends, **trunk}.items())


def test_parts_have_tensors_of_their_own(whole):
    before = whole.lm_head.weight.clone()
    with torch.no_grad():
        split_model(whole, SPLIT).client.lm_head.weight.zero_()
    assert torch.equal(whole.lm_head.weight, before)


def test_join_is_the_inverse_of_split(whole, ids_BT):
    parts = split_model(whole, SPLIT)
    joined = join_model(parts.client, parts.trunk)
    assert type(joined) is type(whole)
    state = joined.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items())
    assert torch.equal(joined(ids_BT).logits, whole(ids_BT).logits)


def test_parts_of_different_cuts_do_not_join(whole):
    client, trunk = split_model(whole, "1/2/1").client, split_model(whole, "2/1/1").trunk
    with pytest.raises(ConfigError, match=r"these parts do not fit: .* range\(1, 3\)"):
        join_model(client, trunk)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_initial_parts_are_those_of_the_seeded_whole(tiny_gpt2, tied):
    config = tiny_gpt2(tie_word_embeddings=tied)
    torch.manual_seed(7)
    state = AutoModelForCausalLM.from_config(config).state_dict()
    torch.manual_seed(1)
    untouched = torch.get_rng_state()
    parts = initial_parts(config, SPLIT, seed=7)
    found = {**parts.client.state_dict(), **parts.trunk.state_dict()}
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert torch.equal(torch.get_rng_state(), untouched)


def test_dtype_and_attention_pass_through(tiny_llama):
    options = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    parts = initial_parts(tiny_llama(), SPLIT, 0, **options)
    for part in (parts.client, parts.trunk):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
        assert part.config._attn_implementation == "eager"


def test_a_client_without_a_trunk_says_so(whole, ids_BT):
    client = build_client(whole.config, SPLIT, state_dict=whole.state_dict())
    with pytest.raises(ConfigError, match=r"this client has no trunk: call connect\(client, carry"):
        client(ids_BT)


def test_the_carry_is_handed_the_plain_mask_and_positions(whole, ids_BT):
    parts, seen = split_model(whole, SPLIT), []

    def carry(hidden_BTD, **beside):
        seen.append(beside)
        return parts.trunk.run(hidden_BTD, **beside)

    connect(parts.client, carry)
    mask_BT, positions_BT = torch.ones_like(ids_BT), torch.arange(14).expand(3, 14)
    parts.client(ids_BT)
    parts.client(ids_BT, attention_mask=mask_BT, position_ids=positions_BT)
    assert seen[0] == {"attention_mask_BT": None, "position_ids_BT": None, "cache": None}
    assert seen[1]["attention_mask_BT"] is mask_BT
    assert seen[1]["position_ids_BT"] is positions_BT


def test_a_trunk_s_backbone_is_not_called_alone(whole):
    trunk = split_model(whole, SPLIT).trunk
    with pytest.raises(ConfigError, match="trunk's entry was reached without its model"):
        trunk.model(inputs_embeds=torch.zeros(1, 2, 16))


def test_generation_without_a_remote_cache_says_what_to_do(whole, ids_BT):
    parts = split_model(whole, SPLIT)
    connect(parts.client, parts.trunk.run)
    with pytest.raises(ConfigError, match="generate with use_cache=False"):
        parts.client.generate(ids_BT, max_new_tokens=2)
    asked = {"max_new_tokens": 4, "use_cache": False, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(parts.client.generate(ids_BT, **asked), whole.generate(ids_BT, **asked))


GENERATION = {
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "several a prompt": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("asked", GENERATION.values(), ids=GENERATION)
def test_generated_tokens_are_equal(whole, ids_BT, asked):
    client = split_model(whole, SPLIT).client
    asked = {"max_new_tokens": 10, "min_new_tokens": 10, "pad_token_id": 0, **asked}
    ids_BT = ids_BT[:1] if "prompt_lookup_num_tokens" in asked else ids_BT
    torch.manual_seed(3)
    wanted = whole.generate(ids_BT, **asked)
    torch.manual_seed(3)
    assert torch.equal(client.generate(ids_BT, **asked), wanted)


@pytest.mark.parametrize("max_length", [None, 32], ids=["growing", "static"])
def test_a_cache_of_one_s_own_serves_a_second_turn(whole, ids_BT, max_length):
    client = split_model(whole, SPLIT).client
    asked = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    cache = client.new_cache(max_length)
    asked = {"disable_compile": True, **asked}
    first = client.generate(ids_BT, past_key_values=cache, **asked)
    longer = torch.cat([first, ids_BT[:, :3]], dim=1)
    second = client.generate(longer, past_key_values=cache, **asked)
    assert torch.equal(second, whole.generate(longer, **asked))
    assert cache.get_seq_length() == second.shape[1] - 1


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_dropout_and_checkpointing_change_nothing(tiny_gpt2, ids_BT):
    whole = random_model(tiny_gpt2(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2, vocab_size=99))
    parts = split_model(whole, SPLIT)
    for part in (parts.client, parts.trunk):
        part.gradient_checkpointing_enable()
        blocks = part.get_submodule(part.plan.blocks)
        assert all(blocks[i].gradient_checkpointing for i in part.held_blocks)
    results = []
    for model, members in ((whole, [whole]), (parts.client, [parts.client, parts.trunk])):
        for member in members:
            member.train()
        torch.manual_seed(5)
        model(ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        results.append({n: p.grad for m in members for n, p in m.named_parameters()})
    wanted, found = results
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_the_trunk_runs_with_other_tensors_under_its_own_names(whole):
    trunk = split_model(whole, SPLIT).trunk
    smashed_BTD = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    doubled = {name: p.detach() * 2 for name, p in trunk.named_parameters()}
    there = torch.func.functional_call(trunk, doubled, (smashed_BTD,))
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.mul_(2)
    assert torch.equal(there, trunk.run(smashed_BTD))


def test_threads_may_share_a_trunk(whole):
    trunk = split_model(whole, SPLIT).trunk
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 5, 16, generator=generator) for _ in range(40)]
    with torch.no_grad():
        wanted = [trunk.run(smashed_BTD) for smashed_BTD in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda smashed_BTD: trunk.run(smashed_BTD).detach(), inputs))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_a_trunk_compiles_into_one_graph(whole):
    trunk = split_model(whole, SPLIT).trunk
    smashed_BTD = torch.ones(2, 5, 16)
    compiled = torch.compile(trunk.run, backend="eager", fullgraph=True)
    assert torch.equal(compiled(smashed_BTD), trunk.run(smashed_BTD))


def test_a_trunk_can_be_copied(whole):
    trunk = split_model(whole, SPLIT).trunk
    smashed_BTD = torch.ones(1, 3, 16)
    assert torch.equal(copy.deepcopy(trunk).run(smashed_BTD), trunk.run(smashed_BTD))


def test_a_missing_tensor_is_named(whole):
    state = whole.state_dict()
    del state["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError) as error:
        build_trunk(whole.config, SPLIT, state_dict=state)
    assert "tensor 'model.layers.2.mlp.up_proj.weight' of LlamaForCausalLM is missing" in str(
        error.value
    )
    build_client(whole.config, SPLIT, state_dict=state)


def test_a_tensor_of_another_shape_is_an_error(whole):
    state = whole.state_dict() | {"model.layers.2.mlp.up_proj.weight": torch.zeros(3, 3)}
    with pytest.raises(CheckpointError, match="state_dict: "):
        build_trunk(whole.config, SPLIT, state_dict=state)


@pytest.mark.parametrize("given", [{}, {"source": "x", "state_dict": {}}], ids=["none", "both"])
def test_tensors_come_from_one_place(tiny_llama, given):
    with pytest.raises(ConfigError, match="give either source or state_dict"):
        build_trunk(tiny_llama(), SPLIT, **given)


def test_a_split_that_does_not_fit_names_the_class(whole):
    with pytest.raises(ConfigError, match="LlamaForCausalLM has 4 blocks"):
        split_model(whole, "3/*/3")


HEADS = {
    "decoder, sequence": (hf.LlamaForSequenceClassification, "llama", {"pad_token_id": 0}),
    "decoder, tokens": (hf.Qwen2ForTokenClassification, "qwen2", {"num_key_value_heads": 2}),
    "encoder, sequence": (hf.BertForSequenceClassification, "bert", {}),
    "encoder, masked": (hf.BertForMaskedLM, "bert", {}),
}


@pytest.mark.parametrize(("family", "model_type", "fields"), HEADS.values(), ids=HEADS)
def test_other_heads_are_cut_by_passing_the_class(family, model_type, fields):
    config_class = hf.CONFIG_MAPPING[model_type]
    sizes = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, vocab_size=99)
    torch.manual_seed(0)
    whole = family(config_class(**sizes, intermediate_size=32, **fields)).eval()
    parts = split_model(whole, SPLIT)
    ids_BT = batches(hf.LlamaForCausalLM)["right"]["input_ids"]
    mask_BT = batches(hf.LlamaForCausalLM)["right"]["attention_mask"]
    wanted = whole(ids_BT, attention_mask=mask_BT).logits
    found = parts.client(ids_BT, attention_mask=mask_BT).logits
    assert torch.equal(wanted, found)
    wanted.square().sum().backward()
    found.square().sum().backward()
    gradients = {n: p.grad for m in both(parts) for n, p in m.named_parameters()}
    assert all(torch.equal(p.grad, gradients[n]) for n, p in whole.named_parameters())


def test_a_trunk_is_exact_however_deep_the_cut(tiny_llama):
    whole = random_model(tiny_llama(num_hidden_layers=6, vocab_size=99))
    for split in ("1/4/1", "3/1/2", "1/*/3"):
        assert difference(whole, split_model(whole, split), batches(type(whole))["left"]) == 0.0


@pytest.mark.parametrize("model_type", ["llama", "bloom"])
def test_a_config_that_asks_for_attentions_can_be_cut(model_type):
    config = tiny_config(model_type, num_hidden_layers=4)
    whole = random_model(config, attn_implementation="eager")
    whole.config.output_attentions = True
    ids_BT = torch.arange(3, 11).reshape(2, 4)
    wanted, found = (model(ids_BT) for model in (whole, split_model(whole, SPLIT).client))
    assert torch.equal(found.logits, wanted.logits)
    assert found.attentions[1:3] == (None, None)
    for i in (0, 3):
        assert torch.equal(found.attentions[i], wanted.attentions[i])


def test_no_stand_in_holds_weights(whole):
    parts = split_model(whole, SPLIT)
    for part in both(parts):
        for i in set(range(4)) - set(part.held_blocks):
            block: nn.Module = part.get_submodule(f"{part.plan.blocks}.{i}")
            assert not list(block.parameters())
            assert not list(block.buffers())
