"""A tiny model with a tokenizer, in a directory as users have them."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedsplit.data import load_corpus
from fedsplit.data.tokenizing import train_tokenizer
from fedsplit.spec import DataSpec

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The chat template of SmolLM2 and Qwen, without their system prompts."""


def make_model(
    folder: Path, blocks: int = 4, width: int = 16, seed: int = 0, template: str = ""
) -> None:
    """Save a random Llama and a tokenizer, with a chat template in ChatML if one is given."""
    tokenizer = train_tokenizer(load_corpus(DataSpec()), 300)
    if template:
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = template
    sizes = dict(hidden_size=width, intermediate_size=32, vocab_size=len(tokenizer))
    heads = dict(num_hidden_layers=blocks, num_attention_heads=2, num_key_value_heads=1)
    ids = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ids, max_position_embeddings=256))
    for matrix in (p for p in model.parameters() if p.ndim > 1):
        torch.nn.init.normal_(matrix, std=0.4)  # so that one token depends on those before it
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
