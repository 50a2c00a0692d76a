"""Models from quantized checkpoints: parts of dequantized weights are exact, others are refused."""

import struct

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fedsplit.errors import UnsupportedModel
from fedsplit.model import build_client, initial_parts, join_model, split_model
from fedsplit.model.checkpoint import model_fingerprint
from fedsplit.spec import SplitSpec
from simulations.families import difference, random_model

SPLIT = SplitSpec.parse("1/2/1")
STRING, UINT32, FLOAT32, ARRAY = 8, 4, 6, 9  # GGUF's numbers for kinds of values
F32, Q8_0 = 0, 8  # and of tensors


def _string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def _field(name, value):
    if isinstance(value, str):
        return _string(name) + struct.pack("<I", STRING) + _string(value)
    if isinstance(value, list):
        head = struct.pack("<IIQ", ARRAY, STRING, len(value))
        return _string(name) + head + b"".join(map(_string, value))
    kind = struct.pack("<If", FLOAT32, value) if isinstance(value, float) else b""
    return _string(name) + (kind or struct.pack("<II", UINT32, value))


def _as_q8_0(tensor):
    """Blocks of 32 values in 8 bits, each with its scale in half precision."""
    blocks = tensor.reshape(-1, 32)
    scales = (blocks.abs().amax(dim=1, keepdim=True) / 127).half()
    values = (blocks / scales.float()).round().to(torch.int8)
    return torch.cat([scales.view(torch.int8), values], dim=1).numpy().tobytes()


def _write_gguf(path, fields, tensors, kind):
    """A GGUF file, version 3; matrices are stored as `kind`, vectors as F32."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(fields))
    head += b"".join(_field(name, value) for name, value in fields.items())
    data = b""
    for name, tensor in tensors.items():
        own, dims = kind if tensor.ndim > 1 else F32, tensor.shape[::-1]
        head += _string(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        head += struct.pack("<IQ", own, len(data))
        raw = _as_q8_0(tensor) if own == Q8_0 else tensor.numpy().tobytes()
        data += raw + bytes(-len(raw) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + data)


def _tiny_llama(directory, kind):
    width, vocabulary = 32, 99
    draws = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (vocabulary, width), "output_norm": (width,)}
    shapes["output"] = (vocabulary, width)
    for block in range(4):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            shapes[f"blk.{block}.{name}"] = (width, width)
        shapes[f"blk.{block}.attn_norm"] = shapes[f"blk.{block}.ffn_norm"] = (width,)
    fields = {
        "general.architecture": "llama",
        "llama.block_count": 4,
        "llama.context_length": 64,
        "llama.embedding_length": width,
        "llama.feed_forward_length": width,
        "llama.attention.head_count": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": vocabulary,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [str(i) for i in range(vocabulary)],
    }
    tensors = {f"{n}.weight": torch.randn(s, generator=draws) / 8 for n, s in shapes.items()}
    _write_gguf(directory / "tiny.gguf", fields, tensors, kind)
    return AutoModelForCausalLM.from_pretrained(directory, gguf_file="tiny.gguf")


@pytest.mark.parametrize("kind", [F32, Q8_0], ids=["F32", "Q8_0"])
def test_a_model_from_gguf_is_split_exactly(tmp_path, kind):
    whole = _tiny_llama(tmp_path, kind)
    ids_BT = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    parts = split_model(whole, "1/2/1")
    assert difference(whole, parts, {"input_ids": ids_BT, "labels": ids_BT}) == 0.0
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(parts.client.generate(ids_BT, **asked), whole.generate(ids_BT, **asked))
    joined = join_model(parts.client, parts.trunk).state_dict()
    assert all(torch.equal(tensor, joined[name]) for name, tensor in whole.state_dict().items())


def test_the_parts_of_a_model_from_gguf_are_those_of_a_plain_one(tmp_path):
    whole = _tiny_llama(tmp_path, F32)
    parts = split_model(whole, "1/2/1")
    client = parts.client
    assert not hasattr(client.config, "quantization_config")
    assert whole.config.quantization_config.quant_method == "gguf"
    join_model(client, parts.trunk).save_pretrained(tmp_path / "plain")
    plain = split_model(str(tmp_path / "plain"), "1/2/1").client
    assert model_fingerprint(client.config, SPLIT) == model_fingerprint(plain.config, SPLIT)


METHODS = {
    "gptq": {"bits": 4},
    "awq": {"bits": 4},
    "fp8": {"weight_block_size": [128, 128]},
}


@pytest.mark.parametrize(("method", "fields"), METHODS.items(), ids=METHODS)
def test_a_quantized_checkpoint_is_refused(tiny_llama, tmp_path, method, fields):
    config = tiny_llama(vocab_size=99)
    random_model(config).save_pretrained(tmp_path)
    config.quantization_config = {"quant_method": method, **fields}
    config.save_pretrained(tmp_path)
    says = rf"LlamaForCausalLM: its weights are quantized \({method}\)"
    with pytest.raises(UnsupportedModel, match=says):
        split_model(str(tmp_path), SPLIT)
    with pytest.raises(UnsupportedModel, match=says):
        build_client(config, SPLIT, source=str(tmp_path))
    with pytest.raises(UnsupportedModel, match=says):
        initial_parts(config, SPLIT, 0)


class _EightBit(nn.Linear):
    """A layer whose weight is kept in 8 bits beside its scale, as bitsandbytes does it."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.detach().abs().amax() / 127
        values = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(values, requires_grad=False)


def test_quantized_weights_in_memory_are_refused(tiny_llama):
    whole = random_model(tiny_llama(vocab_size=99))
    attention = whole.model.layers[1].self_attn
    attention.q_proj = _EightBit(attention.q_proj)
    whole.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(UnsupportedModel) as error:
        split_model(whole, SPLIT)
    assert "its weights are quantized (bitsandbytes)" in str(error.value)
    assert "'model.layers.1.self_attn.q_proj.weight' is torch.int8" in str(error.value)
