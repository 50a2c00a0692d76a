"""A model in memory is split with all of its state, and not only with its config and tensors."""

import copy
import logging

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.errors import UnsupportedModel
from fedsplit.link import LocalLink
from fedsplit.model import connect, initial_parts, split_model
from fedsplit.spec import SplitSpec
from fedsplit.trunk.service import TrunkService
from tests.core.worlds import batch, same, small_run

SPLIT = "1/2/1"
IDS_BT = batch(0).inputs["input_ids"]


def parts_of(whole, **options):
    parts = split_model(whole, SPLIT, **options)
    return parts.client, parts.trunk


def parameters_of(parts):
    """The parameters of both parts, by name; a tied one has all of its names."""
    return {k: p for part in parts for k, p in part.named_parameters(remove_duplicate=False)}


def test_frozen_parameters_stay_frozen(tiny_gpt2):
    whole = GPT2LMHeadModel(tiny_gpt2()).requires_grad_(False)
    whole.transformer.h[2].requires_grad_()
    whole.lm_head.requires_grad_()
    ours = parameters_of(parts_of(whole))
    for name, parameter in whole.named_parameters(remove_duplicate=False):
        assert ours[name].requires_grad == parameter.requires_grad, name


def test_every_module_keeps_its_mode(tiny_gpt2):
    whole = GPT2LMHeadModel(tiny_gpt2()).train()
    whole.transformer.h[1].eval()
    modes = {name: module.training for name, module in whole.named_modules()}
    for part in parts_of(whole):
        assert {name: modes[name] for name, _ in part.named_modules()} == {
            name: module.training for name, module in part.named_modules()
        }
    assert not parts_of(whole.eval())[0].training
    assert not initial_parts(tiny_gpt2(), SplitSpec.parse(SPLIT), 0).trunk.training


@pytest.mark.parametrize("options", [{"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_activation_checkpointing_stays_on(tiny_llama, options):
    whole = LlamaForCausalLM(tiny_llama()).train()
    whole.activation_checkpointing_enable(options)
    client, trunk = parts_of(whole)
    for blocks, kept in ((client.model.layers, (0, 3)), (trunk.model.layers, (1, 2))):
        for index in kept:
            assert blocks[index].gradient_checkpointing
            assert blocks[index]._gradient_checkpointing_func.keywords == options
    for model in (whole, client):
        embeds_BTD = model.get_input_embeddings()(IDS_BT)
        model(inputs_embeds=embeds_BTD, labels=IDS_BT).loss.backward()
    ours = parameters_of((client, trunk))
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, msg=name)


def test_a_trunk_that_checkpoints_already_draws_the_same_dropout_again(tiny_gpt2):
    run, found = small_run(), []
    for options in (None, {"use_reentrant": True}):
        parts = initial_parts(tiny_gpt2(resid_pdrop=0.3), run.split, run.seed)
        if options:
            parts.trunk.activation_checkpointing_enable(options)
        with TrunkService(parts.trunk, run) as service:
            link = LocalLink(service, service.admit("alice"))
            trunk = RemoteTrunk(link, parts.client, run, client="alice")
            connect(parts.client, trunk)
            ClientTrainer(parts.client, trunk, run).fit([[batch(0)]])
        found.append({name: p.detach() for name, p in parts.trunk.named_parameters()})
    assert same(*found)


def test_a_copy_that_shares_a_trunk_has_its_own_mode(tiny_gpt2):
    run, whole = small_run(), GPT2LMHeadModel(tiny_gpt2(resid_pdrop=0.3)).eval()
    parts = split_model(whole, run.split)
    with TrunkService(parts.trunk, run) as service, torch.no_grad():
        link = LocalLink(service, service.admit("alice"))
        trunk = RemoteTrunk(link, parts.client, run, client="alice")
        trunk.open()
        copied = copy.deepcopy(parts.client)
        for part in (parts.client.train(), copied.eval()):
            connect(part, trunk)
        wanted = whole(IDS_BT).logits
        assert torch.equal(copied(IDS_BT).logits, wanted)
        assert not torch.equal(parts.client(IDS_BT).logits, wanted)


def test_settings_of_modules_and_of_the_model_stay(tiny_gpt2):
    whole = GPT2LMHeadModel(tiny_gpt2(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)).train()
    for module in whole.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    whole.config.name_or_path = "someone/something"
    whole.generation_config.temperature = 0.25
    whole.loss_function = lambda logits, labels, **_: logits.square().mean()
    client, _ = parts_of(whole)
    ours, theirs = (model(IDS_BT, labels=IDS_BT) for model in (client, whole))
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)
    assert client.config.name_or_path == "someone/something"
    assert client.generation_config.temperature == 0.25
    client.generation_config.temperature = 0.5
    assert whole.generation_config.temperature == 0.25


def converted(whole):
    return whole.bfloat16()


def with_a_head_of_another_dtype(whole):
    return whole.bfloat16().apply(
        lambda module: module.float() if module is whole.model.norm else 0
    )


@pytest.mark.parametrize("change", [converted, with_a_head_of_another_dtype])
def test_every_tensor_keeps_its_dtype(tiny_llama, change):
    whole = change(LlamaForCausalLM(tiny_llama(tie_word_embeddings=True)).eval())
    client, trunk = parts_of(whole)
    for name, parameter in parameters_of((client, trunk)).items():
        assert parameter.dtype == whole.get_parameter(name).dtype, name
    for part in (client, trunk):
        for name, buffer in part.named_buffers():
            assert torch.equal(buffer, whole.get_buffer(name)), name
            assert buffer is not whole.get_buffer(name)
    assert client.lm_head.weight is client.model.embed_tokens.weight
    if change is converted:
        assert torch.equal(client(IDS_BT).logits, whole(IDS_BT).logits)


def test_a_dtype_that_is_given_takes_precedence(tiny_llama):
    whole = LlamaForCausalLM(tiny_llama()).bfloat16()
    parts = parts_of(whole, dtype=torch.float32)
    assert {p.dtype for p in parameters_of(parts).values()} == {torch.float32}


def test_hooks_are_left_with_a_warning(tiny_llama, caplog):
    whole = LlamaForCausalLM(tiny_llama())
    whole.enable_input_require_grads()
    whole.model.layers[1].forward = lambda *args, **kwargs: args[0]
    with caplog.at_level(logging.WARNING, "fedsplit"):
        parts_of(whole)
    for module in ("model.embed_tokens", "model.layers.1"):
        assert f"the hooks of 1 modules (such as {module}) are not in its parts" in caplog.text


def test_a_replaced_module_is_refused(tiny_llama):
    whole = LlamaForCausalLM(tiny_llama())
    whole.model.layers[1].input_layernorm = nn.LayerNorm(16, bias=False)
    with pytest.raises(UnsupportedModel, match="input_layernorm' is LayerNorm, but a part has Ll"):
        parts_of(whole)


def test_the_hooks_of_a_model_that_has_returned_hidden_states_are_its_own(tiny_llama, caplog):
    whole = LlamaForCausalLM(tiny_llama()).eval()
    theirs = whole(IDS_BT, output_hidden_states=True).hidden_states
    with caplog.at_level(logging.WARNING, "fedsplit"):
        client, _ = parts_of(whole)
    assert not caplog.records
    ours = client(IDS_BT, output_hidden_states=True).hidden_states
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[-1], theirs[-1])
