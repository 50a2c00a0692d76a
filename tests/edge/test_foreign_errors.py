"""What other libraries raise is one line at an entry point; --debug shows the traceback."""

import io
import json

import pytest
from peft import LoraConfig, get_peft_model
from transformers import GPT2LMHeadModel

from fedsplit.cli import main
from fedsplit.config import compose
from fedsplit.data import load_corpus, load_tokenizer, train_tokenizer
from fedsplit.data.corpora import Corpus, Document
from fedsplit.errors import ConfigError, DataError, UnsupportedModel
from fedsplit.model.build import split_model
from fedsplit.serve.chat import Conversation, Writer, complete
from fedsplit.serve.client import Reached
from fedsplit.spec import DataSpec, RunSpec
from tests.edge.forked import Program

REFUSING = "{{ raise_exception('roles must alternate') }}"


@pytest.fixture
def tokenizer():
    corpus = Corpus(name="x", documents=(Document(text="the cat sat on the mat " * 20, group="x"),))
    return train_tokenizer(corpus, 300)


@pytest.fixture
def writer(tiny_gpt2, tokenizer) -> Writer:
    whole = GPT2LMHeadModel(tiny_gpt2(n_positions=32, vocab_size=300))
    parts = split_model(whole, "1/2/1")
    reached = Reached(model=parts.client, trunk=None, link=None, route=None)
    options = {"max_new_tokens": 4, "do_sample": False}
    return Writer(reached=reached, tokenizer=tokenizer, options=options, out=io.StringIO())


def test_a_prompt_beyond_the_positions_names_them(writer):
    with pytest.raises(ConfigError, match=r"the text has \d+ tokens and up to 4 new ones, but the"):
        complete(writer, "mat cat " * 40)


def test_a_token_without_a_row_in_the_embedding_is_named(writer):
    writer.tokenizer.add_tokens([f"<{number}>" for number in range(300)])
    with pytest.raises(
        ConfigError, match=r"the token '<299>' with number \d+, but .* has 300 rows"
    ):
        complete(writer, "the cat <299>")


def test_a_chat_beyond_the_positions_names_them(writer):
    conversation = Conversation(writer)
    with pytest.raises(ConfigError, match="but the model has 32 positions; shorten it, lower"):
        for _ in range(20):
            conversation.answer("sat on the mat")


def test_a_template_that_refuses_says_why(writer):
    writer.tokenizer.chat_template = REFUSING
    with pytest.raises(ConfigError, match="template refuses this conversation: roles must alter"):
        Conversation(writer).answer("the cat")


def test_bytes_that_are_not_utf8_are_named(writer):
    typed = b"caf\xe9".decode("utf-8", "surrogateescape")  # as Python decodes arguments
    with pytest.raises(DataError, match="is not UTF-8: its character 4 is the byte 0xe9"):
        complete(writer, typed)
    with pytest.raises(DataError, match="is not UTF-8: its character 4 is the byte 0xe9"):
        Conversation(writer).answer(typed)


def test_a_tokenizer_of_a_newer_version_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    described = json.loads(file.read_text())
    described["model"]["type"] = "BPE2"
    file.write_text(json.dumps(described))
    with pytest.raises(DataError, match=r"cannot be read .*pip install -U tokenizers"):
        load_tokenizer(str(tmp_path))


def test_a_data_set_with_a_script_is_refused(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "texts.py").write_text("raise SystemExit('the script was run')")
    with pytest.raises(DataError, match=r"cannot be loaded: Dataset scripts are no longer support"):
        load_corpus(DataSpec(kind="hub", path=str(tmp_path / "texts")))


@pytest.mark.parametrize("seed", [1 << 64, -1])
def test_a_seed_beyond_64_bits_is_refused(seed, capsys):
    with pytest.raises(ConfigError, match=f"seed={seed} is too"):
        compose([f"seed={seed}"])
    assert main(["generate", "--model", "m", "--seed", str(seed), "Once"]) == 2
    assert "--seed" in capsys.readouterr().err


def test_the_largest_seed_is_taken():
    assert RunSpec(seed=(1 << 64) - 1).seed == (1 << 64) - 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_model_of_peft_is_refused_with_what_to_pass(tiny_gpt2):
    config = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    adapted = get_peft_model(GPT2LMHeadModel(tiny_gpt2()), config)
    with pytest.raises(UnsupportedModel, match=r"not a PeftModel.*merge_and_unload\(\)"):
        split_model(adapted, "1/2/1")


def test_an_error_that_no_command_knows_is_one_line_with_its_class(tiny_gpt2, tmp_path, capsys):
    GPT2LMHeadModel(tiny_gpt2()).save_pretrained(tmp_path / "model")
    # A shell cannot pass such a path, so no command looks for it.
    words = ["split", str(tmp_path / "model"), "--split", "1/2/1", "--out", f"{tmp_path}/a\0b"]
    assert main(words) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: ValueError: embedded null byte (--debug shows the traceback)"
    assert main([*words, "--debug"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and error.splitlines()[-1].startswith("error: ValueError: ")


@pytest.mark.slow
def test_a_folder_for_runs_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    words = ["-m", "seed=1,2", f"launch.run_dir={tmp_path}/file/runs"]
    code, _, stderr = Program("simulations.run", *words).end()
    assert code == 1
    assert stderr.startswith("error: ") and "Not a directory" in stderr
    assert "Traceback" not in stderr
