"""Whatever transformers generates with the unsplit model, the split one generates too."""

import copy
import inspect

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PreTrainedTokenizerFast,
    TextStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from fedsplit.errors import ConfigError, ProtocolError
from fedsplit.wire.messages import OpenRequest
from simulations.families import random_model
from simulations.tiny import tiny_config
from tests.core.families import FAMILIES
from tests.core.generating import prompt, scene
from tests.core.worlds import batch, small_run, world

KV = ("server", "client")
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.3},
    "beams": {"num_beams": 3},
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One word for each token."""
    words = {f"w{i}": i for i in range(98)} | {"abcdef": 98}  # transformers tries it on this one
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="w0", eos_token="w2", unk_token="w3", padding_side="left"
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_a_padded_batch_are_equal_in_every_mode(family):
    ids_BT = prompt(rows=3, pad=4)
    with scene(family, chunk_tokens=15) as here:
        alice, bob = here.client("alice"), here.client("bob", kv="client")
        for asked in MODES.values():
            asked = {"max_new_tokens": 6, "min_new_tokens": 6, **asked}
            wanted = here.wanted(ids_BT, **asked)
            assert torch.equal(alice.says(ids_BT, **asked), wanted)
        assert torch.equal(bob.says(ids_BT, **asked), wanted)  # beams


def test_clients_of_two_families_keep_their_own_signatures():
    ids_BT = prompt(rows=3, pad=4)
    with scene("gpt2") as here, scene("bloom") as there:
        gpt2, bloom = here.client(), there.client()
        for scene_, client in ((here, gpt2), (there, bloom)):
            assert inspect.signature(client.model.forward) == inspect.signature(
                scene_.whole.forward
            )
            assert torch.equal(client.says(ids_BT), scene_.wanted(ids_BT))


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma3_text", "bloom"])
@pytest.mark.parametrize("kv", KV)
def test_drafts_change_no_token(family, kv):
    ids_1T = torch.cat([prompt(9), prompt(9)], dim=1)
    draft = random_model(tiny_config(family, num_hidden_layers=2), seed=1)
    with scene(family) as here:
        alice = here.client(kv=kv)
        for asked in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": draft}):
            wanted = here.wanted(ids_1T)
            assert torch.equal(here.wanted(ids_1T, **asked), wanted)
            assert torch.equal(alice.says(ids_1T, **asked), wanted)


def test_several_tokens_of_a_draft_cost_one_pass():
    ids_1T = prompt(9).repeat(1, 2)
    with scene("gpt2") as here:
        calls = []
        here.trunk.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].shape[1]))
        here.client().says(ids_1T, assistant_model=here.whole, max_new_tokens=12)
        assert sum(calls) >= 18 + 12
        assert len(calls) < 12


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3_next"])
def test_a_static_cache_is_made_of_the_right_length(family):
    ids_BT = prompt(rows=2, pad=3)
    with scene(family) as here:
        alice = here.client()
        got = alice.says(ids_BT, cache_implementation="static")
        assert torch.equal(got, here.wanted(ids_BT))
        assert [opened.cache_tokens for opened in alice.sent(OpenRequest)] == [12 + 8 - 1]


def test_other_caches_are_refused():
    with scene("gpt2") as here, pytest.raises(ConfigError, match="cache_implementation=quantized"):
        here.client().says(prompt(), cache_implementation="quantized")


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_second_turn_goes_on_from_the_cache_of_the_first(family, kv):
    first_1T, more_1T = prompt(9), prompt(5, seed=1)
    with scene(family) as here:
        alice = here.client(kv=kv)
        cache = alice.model.new_cache()
        said_1T = alice.says(first_1T, past_key_values=cache)
        second_1T = torch.cat([said_1T, more_1T], dim=1)
        before = copy.deepcopy(cache)
        for each in (cache, before):
            said_1T = alice.says(second_1T, past_key_values=each)
            assert torch.equal(said_1T, here.wanted(second_1T))
        assert cache.get_seq_length() == said_1T.shape[1] - 1


def test_copies_of_a_cache_go_separate_ways():
    prefix_1T = prompt(9)
    ends = [prompt(4, seed=seed) for seed in (1, 2, 3)]
    with scene("llama") as here, torch.no_grad():
        alice = here.client()
        cache = alice.model.new_cache()
        alice.model(prefix_1T, past_key_values=cache)
        for end_1T in ends:
            whole_1T = torch.cat([prefix_1T, end_1T], dim=1)
            got = alice.says(whole_1T, past_key_values=copy.deepcopy(cache))
            assert torch.equal(got, here.wanted(whole_1T))


def test_stopping_streaming_and_pipelines_are_those_of_transformers(capsys):
    words = tokenizer()
    texts = [words.decode(prompt(n, seed=n)[0]) for n in (5, 9)]
    with scene("llama") as here:
        alice = here.client()
        for model in (here.whole, alice.model):
            model.generate(
                prompt(5), streamer=TextStreamer(words), max_new_tokens=6, do_sample=False
            )
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2
        assert lines[0] == lines[1] != ""

        longer = here.wanted(prompt(), max_new_tokens=20)[0, 12:].tolist()
        stop = {"min_new_tokens": 0, "max_new_tokens": 20}
        ends = [{"eos_token_id": longer[6]}, {"stop_strings": f"w{longer[5]}", "tokenizer": words}]
        for asked in ends:
            wanted = here.wanted(prompt(), **stop, **asked)
            assert wanted.shape[1] < 12 + 20
            assert torch.equal(alice.says(prompt(), **stop, **asked), wanted)

        said = [
            pipeline("text-generation", model=model, tokenizer=words, batch_size=2)(
                texts, max_new_tokens=6, do_sample=False
            )
            for model in (here.whole, alice.model)
        ]
        assert said[0] == said[1]


def test_linear_attention_is_kept_by_the_trunk_only():
    ids_BT = prompt(rows=2, pad=3)
    with scene("qwen3_next", chunk_tokens=5) as here:
        for asked in MODES.values():
            assert torch.equal(here.client().says(ids_BT, **asked), here.wanted(ids_BT, **asked))
        with pytest.raises(ProtocolError, match="let the trunk keep them"):
            here.client("bob", kv="client").says(ids_BT)


def test_a_cache_takes_no_gradient_and_no_other_batch():
    with scene("gpt2") as here:
        alice = here.client()
        cache = alice.model.new_cache()
        logits_1TV = alice.model(prompt(), past_key_values=cache).logits
        assert torch.equal(logits_1TV, here.whole(prompt()).logits)
        with pytest.raises(ProtocolError, match="no gradient passes through a KV cache"):
            logits_1TV.sum().backward()
        remote = alice.remote.new_cache()
        remote.carry(torch.zeros(1, 3, 32), None, None)
        with pytest.raises(ProtocolError, match="2 sequences came for a cache of 1"):
            remote.carry(torch.zeros(2, 1, 32), None, None)


def test_the_trainer_of_transformers_trains_as_ours_does(tiny_llama, tmp_path):
    """Same batches, same settings: the same losses, and the same weights at both sides."""
    batches = [batch(seed) for seed in range(4)]
    with world(tiny_llama(), small_run()) as here:
        alice = here.add("alice")
        wanted = [alice.trainer.fit([[each]]).loss for each in batches]
        wanted_trunk, wanted_ends = here.trunk_weights(), dict(alice.model.named_parameters())
    rows = [{"input_ids": row, "labels": row} for each in batches for row in each.labels.tolist()]
    with world(tiny_llama(), small_run()) as here:
        bob = here.add("bob")
        ours = SGD(bob.model.parameters(), lr=0.1)
        trainer = Trainer(
            model=bob.model,
            args=TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=2,
                max_steps=4,
                max_grad_norm=0.0,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                train_sampling_strategy="sequential",
            ),
            train_dataset=Dataset.from_list(rows),
            optimizers=(ours, LambdaLR(ours, lambda _: 1.0)),
        )
        with bob.trunk.session():
            followed = bob.trunk.follow(ours)
            trainer.train()
            followed.remove()
        got = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert here.service.engine.version == 4
        assert got == pytest.approx(wanted, abs=1e-4)  # it logs four digits
        weights = here.trunk_weights()
        assert all(torch.allclose(weights[k], wanted_trunk[k], atol=1e-6) for k in weights)
        ends = dict(bob.model.named_parameters())
        assert all(torch.allclose(ends[k], wanted_ends[k], atol=1e-6) for k in ends)
