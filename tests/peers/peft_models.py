"""A pytest plugin: the models that peft's tests load from the hub, made here and split."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from fedsplit.model import model_class_for
from simulations.tiny import tiny_config
from tests.peers.splitting import client_of

MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": "opt",
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": "gpt2",
    "peft-internal-testing/tiny-random-GPTJForCausalLM": "gptj",
    "peft-internal-testing/tiny-dummy-qwen2": "qwen2",
    "trl-internal-testing/tiny-random-LlamaForCausalLM": "llama",
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": "gemma3_text",
    "hf-internal-testing/tiny-random-gpt2": "gpt2",
    "hf-internal-testing/tiny-random-MistralForCausalLM": "mistral",
}
IS_SPLIT = os.environ["PEERS_MODELS"] == "split"


@pytest.fixture(autouse=True, scope="session")
def models_of_the_hub() -> Iterator[None]:
    """Make the models that have ids of the hub."""
    load: Any = AutoModelForCausalLM.from_pretrained

    def loaded(name: str, *args: Any, **kwargs: Any) -> Any:
        whole = load(str(folder / MODELS[name]) if name in MODELS else name, *args, **kwargs)
        return client_of(whole) if IS_SPLIT and name in MODELS else whole

    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        folder = Path(temporary)
        for family in set(MODELS.values()):
            config = tiny_config(family, num_hidden_layers=4)
            model_class_for(config)(config).save_pretrained(folder / family)
        patch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
        yield
