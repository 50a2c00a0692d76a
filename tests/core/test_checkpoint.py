"""Parts on disk: each loads alone, reads only its own, and joins to the unsplit model."""

import json
import os
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from fedsplit.errors import CheckpointError, StorageError
from fedsplit.model import ClientPart, TrunkPart, build_client, build_trunk, connect, split_model
from fedsplit.model.checkpoint import (
    join_checkpoint,
    load_part,
    model_fingerprint,
    split_checkpoint,
)
from fedsplit.model.manifest import Manifest, hashes_of, with_digest
from fedsplit.model.source import Source, on_meta
from fedsplit.spec import SplitSpec
from simulations.families import batches, random_model
from simulations.tiny import tiny_config
from tests.core.damage import room_for, with_flipped

SPLIT = SplitSpec.parse("1/2/1")
FAMILIES = "gpt2 llama gemma2 bloom falcon olmoe mixtral granite".split()
SHARDS = {"one file": "1GB", "shards": "20KB"}


def _saved(directory, model_type="llama", shard="20KB"):
    whole = random_model(tiny_config(model_type, num_hidden_layers=4))
    whole.save_pretrained(directory, max_shard_size=shard)
    return whole


def _same(whole, other):
    state = other.state_dict()
    return whole.state_dict().keys() == state.keys() and all(
        torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("shard", SHARDS.values(), ids=SHARDS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_there_and_back_again(model_type, shard, tmp_path):
    whole = _saved(tmp_path / "whole", model_type, shard)
    made = split_checkpoint(str(tmp_path / "whole"), SPLIT, tmp_path / "parts")
    client, trunk = load_part(made["bottom-top"]), load_part(made["trunk"])
    assert isinstance(client, ClientPart)
    assert isinstance(trunk, TrunkPart)
    connect(client, trunk.run)
    batch = batches(type(whole))["none"]
    assert torch.equal(client(**batch).logits, whole(**batch).logits)
    join_checkpoint(made["bottom-top"], made["trunk"], tmp_path / "joined")
    joined, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "joined", output_loading_info=True
    )
    assert _same(whole, joined)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_a_source_is_split_without_being_whole_in_memory(tmp_path):
    whole = _saved(tmp_path)
    parts = split_model(str(tmp_path), "1/*/1")
    batch = batches(type(whole))["right"]
    assert torch.equal(parts.client(**batch).logits, whole(**batch).logits)


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_part_reads_its_own_tensors_only(model_type, tmp_path):
    whole = _saved(tmp_path, model_type, "1GB")
    for build in (build_client, build_trunk):
        part = build(whole.config, SPLIT, source=str(tmp_path))
        read = Source(name=str(tmp_path)).tensors_of(on_meta(type(part), part.config))
        own = sum(p.numel() for p in part.state_dict().values())
        assert sum(t.numel() for t in read.values()) == own


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_part_needs_its_own_shards_only(model_type, tmp_path):
    whole = _saved(tmp_path, model_type, "1KB")
    _without_the_trunk_s_shards(tmp_path)
    client = build_client(whole.config, SPLIT, source=str(tmp_path))
    assert torch.equal(client.lm_head.weight, whole.lm_head.weight)
    with pytest.raises(CheckpointError, match=r"model-\d+-of-\d+.safetensors is missing"):
        build_trunk(whole.config, SPLIT, source=str(tmp_path))


GROWTH = """
import gc, sys
gc.disable()  # it would take a fifth of the time of the imports
from fedsplit.model import build_client
from fedsplit.model.source import Source
from fedsplit.spec import SplitSpec

def peak_kib_with_client_of(source):
    client = build_client(Source(name=source).config(), SplitSpec.parse("1/*/1"), source=source)
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

# The first part pays for what torch and transformers load on first use.
before = peak_kib_with_client_of(sys.argv[1])
print(peak_kib_with_client_of(sys.argv[2]) - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_the_trunk_is_never_in_the_client_s_memory(tmp_path):
    sizes = dict(hidden_size=256, intermediate_size=1024, num_attention_heads=4, vocab_size=64)
    for name, num_blocks in (("small", 3), ("large", 22)):
        whole = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=num_blocks, **sizes))
        whole.save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", GROWTH, str(tmp_path / "small"), str(tmp_path / "large")]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    trunk = build_trunk(whole.config, SplitSpec.parse("1/*/1"), source=str(tmp_path / "large"))
    trunk_kib = sum(p.numel() * p.element_size() for p in trunk.parameters()) // 1024
    assert trunk_kib > 80_000
    assert int(told.stdout) < trunk_kib // 2


FROM_HUB = """
import gc, sys
gc.disable()  # it would take a fifth of the time of the imports
from fedsplit.errors import CheckpointError
from fedsplit.model import build_client, build_trunk
from fedsplit.model.source import Source
from fedsplit.spec import SplitSpec

source, split = Source(name="somebody/tiny"), SplitSpec.parse("1/2/1")
client = build_client(source.config(), split, source=source.name)
print(source.commit(), len(client.state_dict()), client.generation_config.top_k)
try:
    build_trunk(source.config(), split, source=source.name)
except CheckpointError as exc:
    print(exc)
"""


@pytest.mark.slow
def test_a_hub_id_needs_the_part_s_shards_only(tmp_path):
    # What the hub's client leaves after a download, without the shards that only the trunk needs.
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--somebody--tiny"
    whole = random_model(tiny_config("llama", num_hidden_layers=4))
    whole.generation_config.update(do_sample=True, top_k=7)
    whole.save_pretrained(cached / "snapshots" / commit, max_shard_size="1KB")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    missing = _without_the_trunk_s_shards(cached / "snapshots" / commit)
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    told = subprocess.run(
        [sys.executable, "-c", FROM_HUB],
        capture_output=True, text=True, check=True, timeout=120, env=env,
    )  # fmt: skip
    first, second = told.stdout.splitlines()
    assert first == f"{commit} {len(split_model(whole, SPLIT).client.state_dict())} 7"
    assert any(file in second for file in missing)


def _without_the_trunk_s_shards(directory):
    """Delete the files that hold nothing but tensors of blocks 1 and 2; says which."""
    files = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    trunk = ("model.layers.1.", "model.layers.2.")
    foreign = set(files.values()) - {f for name, f in files.items() if not name.startswith(trunk)}
    assert len(foreign) > len(set(files.values())) // 3
    for file in foreign:
        (directory / file).unlink()
    return foreign


def test_a_part_s_directory_is_no_model_of_its_own(tmp_path):
    _saved(tmp_path / "whole")
    made = split_checkpoint(str(tmp_path / "whole"), SPLIT, tmp_path / "parts")
    for directory in made.values():
        with pytest.raises(ValueError, match="one part of a split model and not a model"):
            AutoModelForCausalLM.from_pretrained(directory)


def test_the_client_s_directory_has_the_tokenizer(tmp_path):
    _saved(tmp_path / "whole")
    (tmp_path / "whole" / "tokenizer.json").write_text("{}")
    made = split_checkpoint(str(tmp_path / "whole"), SPLIT, tmp_path / "parts")
    assert (made["bottom-top"] / "tokenizer.json").read_text() == "{}"
    assert not (made["trunk"] / "tokenizer.json").exists()


def test_the_manifest_says_what_the_part_is_of(tmp_path):
    whole = _saved(tmp_path / "whole")
    made = split_checkpoint(str(tmp_path / "whole"), SPLIT, tmp_path / "parts")
    told = json.loads((made["trunk"] / "manifest.json").read_text())
    assert (told["part"], told["revision"]) == ("trunk", "")
    assert told["model"] == str(tmp_path / "whole")
    assert told["model_class"] == "LlamaForCausalLM"
    assert (told["split"], told["trunk_blocks"]) == ("1/2/1", [1, 3])
    assert told["fingerprint"] == model_fingerprint(whole.config, SPLIT)
    assert set(told["versions"]) == {"fedsplit", "transformers", "torch"}
    files = {"config.json", "part.safetensors", "model.safetensors.index.json"}
    assert set(told["files"]) == files
    assert not list(made["trunk"].glob("*.tmp"))


def _edit_manifest(directory, **fields):
    path = directory / "manifest.json"
    # As an author of manifests does: the digest is that of the new fields.
    path.write_text(json.dumps(with_digest(json.loads(path.read_text()) | fields)))


def _flip_a_bit(directory):
    path = directory / "part.safetensors"
    path.write_bytes(with_flipped(path.read_bytes(), -8))


def _drop_a_tensor(directory):
    path = directory / "part.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path)
    _edit_manifest(directory, files=hashes_of(directory))


DAMAGE = {
    "a bit": (_flip_a_bit, r"part.safetensors: sha256 is [0-9a-f]{64}, but manifest.json says"),
    "a tensor": (
        _drop_a_tensor,
        r"tensor 'model.layers.1.mlp.up_proj.weight' of LlamaForCausalLM is missing \(1 missing",
    ),
    "a file": (
        lambda d: (d / "config.json").unlink(),
        r"config.json: missing, but manifest.json lists it",
    ),
    "the manifest": (lambda d: (d / "manifest.json").unlink(), r"no readable manifest.json"),
    "half a manifest": (
        lambda d: (d / "manifest.json").write_text("{"),
        r"manifest.json: not JSON",
    ),
    "brackets": (
        lambda d: (d / "manifest.json").write_text("[" * 100_000),
        r"manifest.json: not JSON",
    ),
    "another list": (
        lambda d: (d / "manifest.json").write_text("[]"),
        r"manifest.json: has list, but needs",
    ),
    "the cut": (
        lambda d: _edit_manifest(d, split="2/1/1"),
        r"config.json and split 2/1/1 have fingerprint",
    ),
    "the split": (lambda d: _edit_manifest(d, split="x"), r"split='x' is not of the form"),
    "the part": (lambda d: _edit_manifest(d, part="head"), r"part='head' is not one of"),
    "the format": (
        lambda d: _edit_manifest(d, format=9),
        r"format=9; this fedsplit reads 3; split",
    ),
    "the class": (lambda d: _edit_manifest(d, model_class="os"), r"no model class 'os'"),
    "a path": (lambda d: _edit_manifest(d, files={"../x": ""}), r"plain file names"),
    "a type": (lambda d: _edit_manifest(d, split=5), r"split=5 is not <class 'str'>"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "text"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_part_is_one_clear_line(damage, text, tmp_path):
    _saved(tmp_path / "whole")
    trunk = split_checkpoint(str(tmp_path / "whole"), SPLIT, tmp_path / "parts")["trunk"]
    damage(trunk)
    with pytest.raises(CheckpointError, match=text) as error:
        load_part(trunk)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_of_a_manifest_changes_nothing_that_is_read(tmp_path):
    _saved(tmp_path / "whole")
    trunk = split_checkpoint(str(tmp_path / "whole"), SPLIT, tmp_path / "parts")["trunk"]
    path = trunk / "manifest.json"
    whole, manifest = path.read_bytes(), Manifest.read(trunk)
    # 11 has no factor in common with 8, so all bits of a byte are tried.
    for bit in range(0, len(whole) * 8, 11):
        path.write_bytes(with_flipped(whole, bit))
        with suppress(CheckpointError):
            assert Manifest.read(trunk) == manifest, f"bit {bit}"


def test_a_full_disk_is_our_error_and_a_saved_part_stays(tmp_path):
    whole = tmp_path / "whole"
    _saved(whole)
    (whole / "tokenizer.json").write_text("x" * 2000)
    made = split_checkpoint(str(whole), SPLIT, tmp_path / "parts")
    client, trunk = map(load_part, made.values())
    for write, path in (
        (lambda: trunk.save_pretrained(made["trunk"]), made["trunk"] / "part.safetensors"),
        (lambda: split_checkpoint(str(whole), SPLIT, tmp_path / "2"), tmp_path / "2/bottom-top"),
        (lambda: join_checkpoint(client, trunk, tmp_path / "joined"), tmp_path / "joined"),
    ):
        with pytest.raises(StorageError, match=f"{path} cannot be written: .*File too large"):
            with room_for(1500):
                write()
    assert load_part(made["trunk"]).trunk_blocks == trunk.trunk_blocks


def test_parts_join_in_their_order_only(tmp_path):
    _saved(tmp_path / "whole")
    made = split_checkpoint(str(tmp_path / "whole"), SPLIT, tmp_path / "parts")
    with pytest.raises(CheckpointError, match="join needs the bottom-top part first"):
        join_checkpoint(made["trunk"], made["bottom-top"], tmp_path / "joined")


def test_a_source_without_a_tensor_is_one_clear_line(tmp_path):
    whole = _saved(tmp_path, shard="1GB")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="'model.layers.3.mlp.up_proj.weight' of Llama"):
        build_client(whole.config, SPLIT, source=str(tmp_path))


def _edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


RUNS_CODE = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}

SOURCE_DAMAGE = {
    "an index that is a list": (
        lambda d: (d / "model.safetensors.index.json").write_text("[]"),
        r"index.json: holds a list, not a JSON object",
    ),
    "a config of another width": (
        lambda d: _edit(d / "config.json", intermediate_size=48),
        r"tensor 'model.layers.0.mlp.\w+_proj.weight' has shape \(\d+, \d+\), but LlamaForCausalLM",
    ),
    "a config with text for a number": (
        lambda d: _edit(d / "config.json", num_hidden_layers="x"),
        r"not a model that transformers .* can read",
    ),
    "a generation config that is cut off": (
        lambda d: (d / "generation_config.json").write_text("{"),
        r"generation_config.json: ",
    ),
    "code of its own": (
        lambda d: _edit(d / "config.json", model_type="own", auto_map=RUNS_CODE),
        r"not a model that transformers .* can read",
    ),
}


@pytest.mark.parametrize(("damage", "text"), SOURCE_DAMAGE.values(), ids=SOURCE_DAMAGE)
def test_a_damaged_source_is_one_clear_line(damage, text, tmp_path):
    _saved(tmp_path, shard="20KB")
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=text) as error:
        split_model(str(tmp_path), SPLIT)
    assert "\n" not in str(error.value)


def test_pickled_weights_are_not_read(tmp_path):
    whole = _saved(tmp_path, shard="1GB")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match="no model.safetensors, but pytorch_model.bin; fedsplit"
    ):
        build_client(whole.config, SPLIT, source=str(tmp_path))


def test_a_directory_without_a_model_is_one_clear_line(tmp_path):
    with pytest.raises(CheckpointError, match="not a model that transformers") as error:
        split_model(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_fingerprint_is_of_the_model_and_the_cut(tmp_path, tiny_llama):
    config = tiny_llama()
    config.save_pretrained(tmp_path)
    again = LlamaConfig.from_pretrained(tmp_path)
    parts = split_model(random_model(tiny_llama(intermediate_size=48)), SPLIT)
    one = model_fingerprint(config, SPLIT)
    assert len(one) == 16
    assert one == model_fingerprint(again, SplitSpec.parse("1/*/1"))
    assert one != model_fingerprint(config, SplitSpec.parse("2/1/1"))
    assert one != model_fingerprint(tiny_llama(rope_theta=1.0), SPLIT)
    assert one != model_fingerprint(parts.client.config, SPLIT)
    ends, trunk = (model_fingerprint(p.config, SPLIT) for p in (parts.client, parts.trunk))
    assert ends == trunk


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_fingerprint_survives_the_disk(model_type, tmp_path):
    whole = _saved(tmp_path, model_type)
    made = split_checkpoint(str(tmp_path), SPLIT, tmp_path / "parts")
    told = {json.loads((d / "manifest.json").read_text())["fingerprint"] for d in made.values()}
    assert told == {model_fingerprint(whole.config, SPLIT)}


def test_a_manifest_that_a_killed_process_left_is_not_listed(tmp_path):
    (tmp_path / "part.safetensors").write_bytes(b"weights")
    for name in ("manifest.json", ".unfinished-manifest.json"):
        (tmp_path / name).write_text("{}")
    assert list(hashes_of(tmp_path)) == ["part.safetensors"]
