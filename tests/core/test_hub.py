"""A name that cannot be loaded: a path that is missing, or a hub that does not answer."""

import pytest
from huggingface_hub import constants

from fedsplit.data import load_tokenizer
from fedsplit.errors import CheckpointError, ConnectionLost
from fedsplit.model.source import Source

NO_DIRECTORY = ("/no/such", "no/such/folder", "./none", "a b")


@pytest.mark.parametrize("name", NO_DIRECTORY)
def test_a_directory_that_is_missing_is_called_so(name):
    for load in (Source(name=name).config, lambda: load_tokenizer(name)):
        with pytest.raises(
            CheckpointError, match=f"^{name}: there is no such directory, and a hub"
        ):
            load()


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, tmp_path):
    # What the libraries take from the environment.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for load in (Source(name="a/b").config, lambda: load_tokenizer("a/b")):
        with pytest.raises(ConnectionLost, match="^a/b: .* the hub http://127.0.0.1:9 does not"):
            load()
