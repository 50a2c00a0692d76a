"""Quantized parts against the unsplit model, quantized the same way by transformers and peft."""

import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BertConfig

from fedsplit.config import compose
from fedsplit.errors import CheckpointError, ConfigError
from fedsplit.flower.prototype import Prototype
from fedsplit.model import build_trunk, connect, join_model, split_model
from fedsplit.model.describe import client_of, parts_of
from fedsplit.model.lora import add_adapters, share_frozen, trainable
from fedsplit.model.quantization import for_training, quantized_layers, settings_of
from fedsplit.model.source import Source, on_meta
from fedsplit.model.tensor_files import LazyTensor
from fedsplit.spec import (
    ClientWeightsSpec,
    LoraSpec,
    ModelSpec,
    RunSpec,
    SplitSpec,
    TrainSpec,
)
from simulations.families import random_model
from tests.core.extras import needs_bitsandbytes

KINDS = ("nf4", "int8")
SPLIT = SplitSpec.parse("1/2/1")
LORA = LoraSpec(enabled=True, rank=2, targets="all-linear")
IDS_BT = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
ASKED = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(params=["llama", "gpt2"])
def source(request, tiny_llama, tiny_gpt2, tmp_path):
    """The folder of a plain checkpoint; the layers of GPT-2 hold their weights transposed."""
    config = {
        "llama": lambda: tiny_llama(hidden_size=64, intermediate_size=64),
        "gpt2": lambda: tiny_gpt2(n_embd=64),
    }[request.param]()
    random_model(config).save_pretrained(tmp_path)
    return str(tmp_path)


def unsplit(source, kind):
    model = AutoModelForCausalLM.from_pretrained(source, **settings_of(kind, torch.float32))
    for_training(model)
    return model


def with_adapters(model, parts):
    """Give the unsplit model, by peft, and its parts the same adapters; return their parameters."""
    for part in (parts.client, parts.trunk):
        add_adapters(part, LORA)
    like = parts.trunk.peft_config["default"]
    config = LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules="all-linear")
    config.fan_in_fan_out = like.fan_in_fan_out
    wrapped = get_peft_model(model, config)
    theirs = {n.removeprefix("base_model.model."): p for n, p in trainable(wrapped).items()}
    ours = {**trainable(parts.client), **trainable(parts.trunk)}
    assert ours.keys() == theirs.keys()
    draws = torch.Generator().manual_seed(2)
    for name, parameter in ours.items():
        parameter.data.normal_(std=0.1, generator=draws)
        theirs[name].data.copy_(parameter.data)
    return ours, theirs


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_those_of_the_unsplit_model(source, kind):
    whole = unsplit(source, kind)
    parts = split_model(source, SPLIT, **settings_of(kind, torch.float32))
    own = {name for part in (parts.client, parts.trunk) for name, _ in quantized_layers(part)}
    assert own == {name for name, _ in quantized_layers(whole)} != set()
    assert torch.equal(parts.client.generate(IDS_BT, **ASKED), whole.generate(IDS_BT, **ASKED))

    ours, theirs = with_adapters(whole, parts)
    # The generation above must not have changed what training computes with.
    for model in (whole, parts.client, parts.trunk):
        model.train()
    expected = whole(input_ids=IDS_BT, labels=IDS_BT).loss
    loss = parts.client(IDS_BT, labels=IDS_BT).loss
    assert loss.item() == expected.item()
    expected.backward()
    loss.backward()
    for name, parameter in ours.items():
        assert torch.equal(parameter.grad, theirs[name].grad), name
    assert all(p.grad.abs().sum() > 0 for name, p in ours.items() if "lora_B" in name)

    joined = join_model(parts.client, parts.trunk)
    assert not hasattr(joined.config, "quantization_config")
    difference = (joined(IDS_BT).logits - parts.client(IDS_BT).logits).abs().max()
    assert difference < 1e-4


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_quantized_already_stay_so(source, kind, tmp_path):
    whole = unsplit(source, kind)
    expected = whole(IDS_BT, labels=IDS_BT).loss.item()
    in_memory = split_model(whole, SPLIT)
    assert in_memory.client(IDS_BT, labels=IDS_BT).loss.item() == expected
    whole.save_pretrained(tmp_path / "quantized")
    from_files = split_model(str(tmp_path / "quantized"), SPLIT)
    assert from_files.client(IDS_BT, labels=IDS_BT).loss.item() == expected
    for parts in (in_memory, from_files):
        assert {name for name, _ in quantized_layers(parts.trunk)}
        assert not [name for name in parts.trunk.state_dict() if ".layers.0." in name]


@needs_bitsandbytes
def test_a_tensor_is_read_when_it_is_quantized(source):
    origin = Source(name=source)
    config = origin.config()
    trunk = build_trunk(config, SPLIT, source=source, **settings_of("nf4", torch.float32))
    tensors = origin.tensors_of(on_meta(type(trunk), config), lazily=True)
    assert {type(tensor) for tensor in tensors.values()} == {LazyTensor}
    name = next(name for name in tensors if name.endswith("weight"))
    assert tensors[name][...].shape == tensors[name].shape
    plain = build_trunk(config, SPLIT, source=source)

    def size(part):
        layers = [f"{name}." for name, _ in quantized_layers(trunk)]
        state = part.state_dict().items()
        return sum(t.nbytes for n, t in state if n.startswith(tuple(layers)) and "bias" not in n)

    # 4 bits, 32 for each 64 values, and two small tables for each layer.
    assert size(trunk) < 0.175 * size(plain)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_copies_share_the_quantized_weights(tiny_llama, kind):
    """A simulation copies a client's model, and a server has a trunk for each adapter."""
    run = RunSpec(
        model=ModelSpec(family="llama", quantize=kind, quantize_client=kind), lora=LORA, split=SPLIT
    )
    parts = parts_of(run, tiny_llama(hidden_size=64))
    prototype, build = Prototype(), lambda: parts.client
    first, *copies = (prototype.model_of("run", build) for _ in range(3))
    other = parts_of(run, tiny_llama(hidden_size=64)).trunk
    share_frozen(other, parts.trunk)
    expected = first(IDS_BT).logits
    for client in copies:
        connect(client, other.run, other.new_cache)
        for _ in range(2):  # the first pass of an int8 layer takes its weight apart
            assert torch.equal(client(IDS_BT).logits, expected)
        assert _places(client) == _places(first)
    assert _places(other) == _places(parts.trunk)


def _places(model):
    return [layer.weight.data_ptr() for _, layer in quantized_layers(model)]


@needs_bitsandbytes
def test_a_classifiers_head_is_not_quantized():
    words = ["model=tiny_bert", "task=sequence_classification", "model.quantize_client=int8"]
    run = compose([*words, "lora=on"])
    client = client_of(run, BertConfig(**run.model.config, vocab_size=64, num_labels=3))
    names = {name for name, _ in quantized_layers(client)}
    assert "bert.encoder.layer.0.output.dense" in names and "classifier" not in names
    assert "classifier.weight" in trainable(client)


@needs_bitsandbytes
def test_a_checkpoint_is_not_quantized_twice(source, tmp_path):
    unsplit(source, "nf4").save_pretrained(tmp_path / "quantized")
    with pytest.raises(ConfigError, match="quantized already .bitsandbytes.; leave"):
        split_model(str(tmp_path / "quantized"), SPLIT, **settings_of("int8", torch.float32))
    run = RunSpec(model=ModelSpec(pretrained=str(tmp_path / "quantized")), split=SPLIT)
    with pytest.raises(ConfigError, match="lora.enabled=false trains them in full; set lora"):
        parts_of(run, Source(name=run.model.pretrained).config())


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_plain_weights_under_a_config_of_quantized_ones_are_refused(source, bits):
    config = Source(name=source).config()
    config.quantization_config = {"quant_method": "bitsandbytes", bits: True}
    config.save_pretrained(source)
    with pytest.raises(CheckpointError, match="is not quantized, but quantization_config in"):
        split_model(source, SPLIT)


def test_without_the_extra_it_is_refused_before_weights_are_made(monkeypatch, tiny_llama):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    run = RunSpec(model=ModelSpec(family="llama", quantize="nf4"), lora=LORA)
    config = tiny_llama()
    config.vocab_size = 1 << 40  # its weights would not fit
    wanted = r"nf4 need bitsandbytes, .* not installed here: pip install 'fedsplit\[quantize\]'"
    with pytest.raises(ConfigError, match=wanted):
        parts_of(run, config)


def test_only_adapters_train_on_quantized_weights():
    for train in (TrainSpec(), TrainSpec(mode="frozen_trunk"), TrainSpec(mode="isolated")):
        model = ModelSpec(quantize="nf4")
        RunSpec(model=model, train=train, lora=LoraSpec(enabled=True))
        if train.mode != "joint":
            RunSpec(model=model, train=train)
    with pytest.raises(ConfigError, match="model.quantize=nf4 freezes the trunk's layers, and"):
        RunSpec(model=ModelSpec(quantize="nf4"))
    with pytest.raises(ConfigError, match="model.quantize_client=int8 freezes the layers of the"):
        RunSpec(model=ModelSpec(quantize_client="int8"), train=TrainSpec(mode="frozen_trunk"))
    with pytest.raises(
        ConfigError, match="for the clients to join, and model.quantize=int8 leaves"
    ):
        sealed = ClientWeightsSpec(sealed=True)
        RunSpec(model=ModelSpec(quantize="int8"), lora=LORA, client_weights=sealed)
    with pytest.raises(ConfigError, match="baseline=fedavg trains the unsplit one; set model.q"):
        RunSpec(model=ModelSpec(quantize="int8"), lora=LORA, baseline="fedavg")


def test_it_counts_for_the_fingerprint_only_where_it_is_on():
    run = RunSpec(lora=LORA)
    assert "model.quantize" not in run.settings
    found = {RunSpec(lora=LORA, model=ModelSpec(quantize=k)).fingerprint for k in ("off", *KINDS)}
    assert len(found) == 3 and run.fingerprint in found
