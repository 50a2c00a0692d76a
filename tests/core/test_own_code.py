"""The Python code that a checkpoint brings: it never runs, and nobody is asked whether it may."""

import io
import json

import pytest

from fedsplit.data.tokenizing import load_tokenizer
from fedsplit.errors import FedsplitError
from fedsplit.model import split_model
from fedsplit.serve.chat import draft_options
from simulations.families import random_model

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

(Path({folder!r}) / "has-run").touch()

class Config(LlamaConfig):
    model_type = "own"

class Model(LlamaForCausalLM):
    config_class = Config

class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "own.Config",
    "AutoModelForCausalLM": "own.Model",
    "AutoTokenizer": [None, "own.Tokenizer"],
}
READERS = {"the model": split_model, "the tokenizer": load_tokenizer, "a draft": draft_options}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_checkpoint_s_code_does_not_run_though_stdin_says_yes(
    read, tiny_llama, tmp_path, monkeypatch
):
    random_model(tiny_llama(vocab_size=99)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"model_type": "own", "auto_map": AUTO_MAP})
    )
    tokenizer = {"tokenizer_class": "Tokenizer", "auto_map": AUTO_MAP}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (tmp_path / "own.py").write_text(CODE.format(folder=str(tmp_path)))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\n"))
    with pytest.raises(FedsplitError):
        read(str(tmp_path))
    assert not (tmp_path / "has-run").exists()
