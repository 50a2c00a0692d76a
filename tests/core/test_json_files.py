"""A checkpoint whose JSON files are an attack is refused at once, with its path."""

import json

import pytest

from fedsplit.errors import CheckpointError, ConfigError, FedsplitError
from fedsplit.model.checkpoint import split_checkpoint
from fedsplit.model.describe import config_of, trunk_of
from fedsplit.model.describe import whole_of as unsplit_of
from fedsplit.model.json_files import MAX_BYTES, read_json
from fedsplit.model.source import Source
from fedsplit.spec import ModelSpec, RunSpec, SplitSpec
from tests.core.generating import whole_of

DEEP = '{"a": ' + "[" * 100_000
CONFIGS = {
    "brackets": ("[" * 100_000, "nested too deep"),
    "brackets in an object": (DEEP, "nested too deep"),
    "a million layers": ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000 is too large"),
    "layers of gpt2": ({"model_type": "gpt2", "n_layer": 10**6}, "n_layer=1000000 is too large"),
    "layers of a part": ({"text_config": {"num_layers": 5000}}, "at most 4096 are allowed"),
    "ten million labels": ({"num_labels": 10**7}, "num_labels=10000000 is too large"),
    "no JSON": ("{", "config.json: not JSON"),
    "no text": (b"\xff\xfe", "config.json: not JSON"),
    "a list": ("[]", "holds a list"),
    "11 MiB": (" " * (11 << 20), f"longer than {MAX_BYTES} bytes"),
    "a number of 5000 digits": ('{"hidden_size": ' + "9" * 5000 + "}", "config.json: not JSON"),
    "a type that is a list": ({"model_type": ["gpt2"]}, "not a model that transformers"),
    "a dtype that is a function": ({"dtype": "load"}, "not a model that transformers"),
}


def written(folder, name, content):
    if isinstance(content, dict):
        content = json.dumps(whole_of("llama").config.to_dict() | content)
    content = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(content)
    return Source(name=str(folder))


@pytest.mark.parametrize(("content", "text"), CONFIGS.values(), ids=CONFIGS)
def test_a_hostile_config_is_refused_before_anything_is_built(content, text, tmp_path):
    source = written(tmp_path, "config.json", content)
    with pytest.raises(CheckpointError, match=text) as caught:
        source.config()
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", 5])
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json"])
def test_weights_outside_of_the_checkpoint_are_not_read(name, file, tmp_path):
    listed = {"weight_map": {"lm_head.weight": file}}
    named = {"transformers_weights": file} if name == "config.json" else {}
    source = written(tmp_path, "config.json", named)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match=r"plain name|must be the name of a file beside it"):
        source.identity(source.config(), whole_of("llama"))


def test_other_files_of_brackets_are_refused(tmp_path):
    source = written(tmp_path, "config.json", {})
    for name in ("generation_config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_text(DEEP)
    with pytest.raises(CheckpointError, match="generation_config.json: its brackets are nested"):
        source.generation_config()
    with pytest.raises(CheckpointError, match="index.json: its brackets are nested"):
        source.dtype(whole_of("llama").config)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path / "missing.json")


SIZES = {
    "no heads of gpt2": ("gpt2", {"n_head": 0}),
    "no heads of llama": ("llama", {"num_attention_heads": 0}),
    "no groups of heads": ("llama", {"num_key_value_heads": 0}),
    "a negative width": ("llama", {"hidden_size": -16}),
    "no vocabulary": ("llama", {"vocab_size": -1}),
    "no positions": ("gpt2", {"n_positions": -4}),
}


@pytest.mark.parametrize(("family", "fields"), SIZES.values(), ids=SIZES)
def test_a_size_below_one_is_named_with_its_value(family, fields, tmp_path):
    ((name, value),) = fields.items()
    named = rf"has {name}={value}\b"
    whole = whole_of(family)
    whole.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    with pytest.raises(FedsplitError, match=named):
        split_checkpoint(str(tmp_path), SplitSpec.parse("1/2/1"), tmp_path / "parts")
    small = {name: n for name, n in whole.config.to_diff_dict().items() if type(n) is int}
    model = ModelSpec(family=family, config=small | fields)
    run = RunSpec(model=model, split=SplitSpec.parse("1/2/1"))
    for build in (trunk_of, unsplit_of):
        with pytest.raises(ConfigError, match=named):
            build(run, config_of(run, None))
