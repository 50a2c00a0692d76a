"""Client and trunk of one model: other settings, weights or adapters are refused by their names."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fedsplit.client.remote import RemoteTrunk
from fedsplit.errors import CheckpointError, ConfigError, ModelMismatch
from fedsplit.link import LocalLink
from fedsplit.model import build_client, build_trunk, connect, join_model, split_model
from fedsplit.model.checkpoint import join_checkpoint, split_checkpoint
from fedsplit.model.identity import files_digest, misfit, model_fingerprint, tensors_digest
from fedsplit.model.lora import add_adapters, load_adapter, save_adapter
from fedsplit.model.source import Source, on_meta
from fedsplit.spec import LoraSpec, SplitSpec
from fedsplit.trunk.service import TrunkService
from simulations.families import random_model
from simulations.tiny import tiny_config
from tests.core.worlds import batch, small_run, world

SPLIT = SplitSpec.parse("1/2/1")
RUN = small_run(split=SPLIT)


def _opened(client, trunk, *, generating=False):
    """Open a session of a client at the service of a trunk."""
    with TrunkService(trunk, RUN) as service:
        remote = RemoteTrunk(LocalLink(service, service.admit("ann")), client, RUN, client="ann")
        connect(client, remote)
        if generating:
            client.generate(torch.arange(3, 9)[None], max_new_tokens=2, do_sample=False)
        else:
            remote.open()


# --- settings ---------------------------------------------------------------------------------

IN_PASSING = {
    "use_cache": False,
    "pad_token_id": 7,
    "eos_token_id": [1, 2],
    "bos_token_id": None,
    "output_attentions": True,
    "return_dict": False,
    "num_labels": 5,
    "problem_type": "regression",
    "dtype": "bfloat16",
    "architectures": ["Other"],
    "name_or_path": "elsewhere",
    "rope_parameters": {"rope_theta": 10000, "rope_type": "default"},
}


@pytest.mark.parametrize("name", IN_PASSING)
def test_a_setting_without_an_effect_on_the_trunk_is_not_of_the_fingerprint(name, tiny_llama):
    config, plain = tiny_llama(), tiny_llama()
    config.update({name: IN_PASSING[name]})
    assert model_fingerprint(config, SPLIT) == model_fingerprint(plain, SPLIT)


def test_a_client_with_more_tokens_and_another_padding_opens_a_session(tiny_llama):
    with world(tiny_llama()) as here:
        ann = here.add("ann")
        ann.model.resize_token_embeddings(ann.model.config.vocab_size + 3)
        ann.model.config.update({"pad_token_id": 3, "use_cache": False})
        link = LocalLink(here.service, here.service.admit("ann"))
        RemoteTrunk(link, ann.model, here.run, client="ann").open()


OTHER = {
    "dropout": (dict(attention_dropout=0.1), r"attention_dropout is 0.1 at the client and 0 at"),
    "a nested field": (
        dict(rope_parameters={"rope_theta": 5000.0, "rope_type": "default"}),
        r"rope_parameters.rope_theta is 5000 at the client and 10000 at the trunk",
    ),
    "two fields": (
        dict(hidden_act="gelu", rms_norm_eps=0.5),
        r'hidden_act is "gelu" at the client and "silu" at the trunk, rms_norm_eps is 0.5 at',
    ),
}


@pytest.mark.parametrize("generating", [False, True], ids=["trains", "generates"])
@pytest.mark.parametrize(("fields", "text"), OTHER.values(), ids=OTHER)
def test_the_settings_that_differ_are_named_with_both_values(fields, text, generating, tiny_llama):
    client = split_model(random_model(tiny_llama(**fields)), SPLIT).client
    trunk = split_model(random_model(tiny_llama()), SPLIT).trunk
    with pytest.raises(ModelMismatch, match=rf"model and cut \(fingerprint\): {text}"):
        _opened(client, trunk, generating=generating)


def test_the_settings_of_another_run_are_named_with_both_values(tiny_llama):
    parts = split_model(random_model(tiny_llama()), SPLIT)
    with TrunkService(parts.trunk, small_run(split=SPLIT, seed=4)) as service:
        link = LocalLink(service, service.admit("ann"))
        with pytest.raises(ModelMismatch, match="seed is 0 at the client and 4 at the trunk;"):
            RemoteTrunk(link, parts.client, RUN, client="ann").open()


# --- weights ----------------------------------------------------------------------------------


@pytest.fixture
def folders(tiny_llama, tmp_path):
    """Two models of one architecture, the first one also in shards; and two adapters of it."""
    config = tiny_llama(vocab_size=99)
    for name, seed, size in (("one", 0, "1GB"), ("shards", 0, "20KB"), ("two", 1, "1GB")):
        random_model(config, seed).save_pretrained(tmp_path / name, max_shard_size=size)
    return tmp_path


def _save_adapter(folder, seed, **places):
    parts = split_model(str(folder / "one"), SPLIT)
    for part in (parts.client, parts.trunk):
        add_adapters(part, LoraSpec(enabled=True, targets="q_proj", **places), seed)
    save_adapter(parts.client, parts.trunk, folder / f"adapter-{seed}")
    return str(folder / f"adapter-{seed}")


def _client(folder):
    return build_client(LlamaConfig.from_pretrained(folder), SPLIT, source=str(folder))


def _trunk(folder):
    return build_trunk(LlamaConfig.from_pretrained(folder), SPLIT, source=str(folder))


@pytest.mark.parametrize("generating", [False, True], ids=["trains", "generates"])
def test_a_client_of_other_weights_is_refused(generating, folders):
    text = r"the weights differ: the digest of a sample of each tensor is \w+ at the client and \w+"
    with pytest.raises(ModelMismatch, match=text):
        _opened(_client(folders / "two"), _trunk(folders / "one"), generating=generating)


def test_the_weights_are_the_same_in_other_files(folders):
    _opened(_client(folders / "shards"), _trunk(folders / "one"))


def test_a_client_of_another_model_in_memory_is_refused(tiny_llama):
    one, two = (split_model(random_model(tiny_llama(), seed), SPLIT) for seed in (0, 1))
    _opened(one.client, one.trunk)
    with pytest.raises(ModelMismatch, match="the weights differ: the digest of the model in memor"):
        _opened(two.client, one.trunk)
    with pytest.raises(ConfigError, match="these parts do not fit: the weights differ"):
        join_model(two.client, one.trunk)


@pytest.mark.parametrize("family", ["gpt2", "olmoe"])  # one is tied, the other has fused experts
def test_a_model_in_memory_is_compared_with_its_files(family, tmp_path):
    config = tiny_config(family, num_hidden_layers=4)
    random_model(config).save_pretrained(tmp_path)
    # Files of other programs have extra tensors, and tied ones twice.
    tensors = load_file(tmp_path / "model.safetensors")
    if family == "gpt2":
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
        tensors["transformer.h.0.attn.bias"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    client = build_client(AutoConfig.from_pretrained(tmp_path), SPLIT, source=str(tmp_path))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    _opened(client, split_model(whole, SPLIT).trunk)
    with torch.no_grad():
        next(p for name, p in whole.named_parameters() if ".1." in name).add_(0.01)
    with pytest.raises(ModelMismatch, match="the weights differ: the digest of a sample of each"):
        _opened(client, split_model(whole, SPLIT).trunk)


def test_a_client_of_the_joined_model_of_a_run_is_told_of_the_trunk_s_start(tiny_llama):
    with world(tiny_llama()) as here:
        ann = here.add("ann")
        start = tensors_digest(join_model(ann.model, here.parts.trunk).state_dict())
        ann.trainer.fit([[batch()]])
        client = split_model(join_model(ann.model, here.parts.trunk), here.run.split).client
        link = LocalLink(here.service, here.service.admit("bob"))
        text = (
            rf"and {start} at the trunk; .* has trained since, to version 1, .* build it from the "
            "trunk's start, and load its trained weights with load_state_dict"
        )
        with pytest.raises(ModelMismatch, match=text):
            RemoteTrunk(link, client, here.run, client="bob").open()
        initial = here.add("cy")
        initial.model.load_state_dict(client.state_dict())
        initial.trunk.open()


def test_parts_on_disk_know_all_weights_of_their_model(folders):
    made = {
        name: split_checkpoint(str(folders / name), SPLIT, folders / f"{name}-parts")
        for name in ("one", "two")
    }
    shutil.rmtree(folders / "one")
    with pytest.raises(ConfigError, match="weights differ: the digest of all their bytes is"):
        join_checkpoint(made["two"]["bottom-top"], made["one"]["trunk"], folders / "joined")
    join_checkpoint(made["one"]["bottom-top"], made["one"]["trunk"], folders / "joined")


def test_a_sample_of_a_large_tensor_counts_and_all_of_it_on_request(tmp_path):
    values = torch.zeros(100_000)
    digests = []
    for name, changes in (("zeros", ()), ("end", (99_999,)), ("between", (70,))):
        path = tmp_path / f"{name}.safetensors"
        save_file({"w": values.index_fill(0, torch.tensor(changes, dtype=int), 1.0)}, path)
        digests.append((files_digest([path]), files_digest([path], full=True)))
    (zeros, all_zeros), (end, all_end), (between, all_between) = digests
    assert zeros != end
    assert zeros == between
    assert len({all_zeros, all_end, all_between}) == 3


ELSEWHERE = b'{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
# The length of the header as the file says it, the header, and the size of the file.
HEADERS = {
    "without end": (1 << 62, b"", 1000),
    "of 200 MB": (200 << 20, b"", 300 << 20),
    "longer than the file": (1000, b"{}", 10),
    "of a tensor that is not in the file": (len(ELSEWHERE), ELSEWHERE, 8 + len(ELSEWHERE)),
}


@pytest.mark.parametrize(("length", "header", "size"), HEADERS.values(), ids=HEADERS)
def test_a_header_that_no_weights_have_is_not_read(tmp_path, length, header, size):
    path = tmp_path / "w.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header)
    os.truncate(path, size)  # a longer file takes no room on the disk
    for read in (files_digest, lambda paths: files_digest(paths, full=True)):
        with pytest.raises(CheckpointError, match="w.safetensors: cannot be read as safetensors"):
            read([path])


FITS = {
    "nothing is known": ({}, {}, ""),
    "one side is not known": ({"sample": "a"}, {"memory": "b"}, ""),
    "one commit": ({"commit": "a"}, {"commit": "a", "sample": "b"}, ""),
    "two commits": ({"commit": "a"}, {"commit": "b"}, "the commit of the checkpoint on the hub is"),
    "two commits with the same weights": (
        {"commit": "a", "sample": "c"},
        {"commit": "b", "sample": "c"},
        "",
    ),
}


@pytest.mark.parametrize(("client", "trunk", "text"), FITS.values(), ids=FITS)
def test_what_both_sides_know_is_compared(client, trunk, text):
    found = misfit(client, trunk)
    assert text in found
    assert bool(text) == bool(found)


# --- adapters ---------------------------------------------------------------------------------

ADAPTERS = {
    "at the client only": (
        (0, None),
        r"the client has an adapter \(\w+\) and the trunk has none; load it at the trunk too",
    ),
    "at the trunk only": (
        (None, 0),
        r"the trunk has an adapter \(\w+\) and the client has none; load it at the client too",
    ),
    "another one": ((0, 1), r"the adapters differ: the digest is \w+ at the client and \w+ at the"),
}


@pytest.mark.parametrize(("seeds", "text"), ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_on_one_side_or_another_adapter_is_refused(seeds, text, folders):
    parts = _client(folders / "one"), _trunk(folders / "one")
    for part, seed in zip(parts, seeds, strict=True):
        if seed is not None:
            load_adapter(part, _save_adapter(folders, seed))
    with pytest.raises(ModelMismatch, match=text):
        _opened(*parts)


def test_one_adapter_on_both_sides_and_one_of_the_client_s_blocks_are_fine(folders):
    both, own = _save_adapter(folders, 0), _save_adapter(folders, 1, trunk=False)
    client, trunk = _client(folders / "one"), _trunk(folders / "one")
    load_adapter(client, own)
    _opened(client, trunk)
    client = _client(folders / "one")
    load_adapter(client, both)
    load_adapter(trunk, both)
    _opened(client, trunk)


def test_a_source_without_the_trunk_s_shards_is_not_hashed(folders):
    config = LlamaConfig.from_pretrained(folders / "shards")
    for path in list((folders / "shards").glob("model-*"))[:1]:
        path.unlink()
    whole = on_meta(LlamaForCausalLM, config)
    assert Source(name=str(folders / "shards")).identity(config, whole) == {}
