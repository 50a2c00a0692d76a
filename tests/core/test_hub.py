"""Names that cannot be loaded, a hub that does not answer, and a disk that is full."""

import resource
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from fedsplit.data import load_corpus, load_tokenizer, train_tokenizer
from fedsplit.data.corpora import Corpus, Document
from fedsplit.errors import CheckpointError, ConnectionLost, StorageError
from fedsplit.model import build_client
from fedsplit.model.source import Source
from fedsplit.serve.chat import draft_options
from fedsplit.spec import DataSpec, SplitSpec
from simulations.families import random_model
from tests.core.hubs import COMMIT, hub_of

NO_DIRECTORY = ("/no/such", "no/such/folder", "./none", "a b")


@pytest.mark.parametrize("name", NO_DIRECTORY)
def test_a_directory_that_is_missing_is_called_so(name):
    for load in (Source(name=name).config, lambda: load_tokenizer(name)):
        with pytest.raises(
            CheckpointError, match=f"^{name}: there is no such directory, and a hub"
        ):
            load()


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """An empty cache of the hub, and libraries that are online."""
    # What the libraries take from the environment.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def files(tiny_gpt2, tmp_path) -> Path:
    """The files of a model with its tokenizer."""
    corpus = Corpus(name="x", documents=(Document(text="the cat sat " * 9, group="x"),))
    random_model(tiny_gpt2()).save_pretrained(tmp_path / "files")
    train_tokenizer(corpus, 280).save_pretrained(tmp_path / "files")
    return tmp_path / "files"


def loads(name: str, config=None):
    """All that a client loads of a pretrained model."""
    build = partial(build_client, config, SplitSpec.parse("1/*/1"), source=name)
    return Source(name=name).config, partial(load_tokenizer, name), build


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, cache):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for load in (*loads("a/b")[:2], partial(draft_options, "a/b")):
        with pytest.raises(ConnectionLost, match="^a/b: .* the hub http://127.0.0.1:9 does not"):
            load()


@pytest.mark.parametrize("name", ["a/b", "unknown"])
def test_libraries_that_are_offline_are_named(monkeypatch, cache, name):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    told = "the model is not in the hub's cache, and .* HF_HUB_OFFLINE is set"
    for load in loads(name)[:2]:
        with pytest.raises(CheckpointError, match=f"^{name}: .*{told}"):
            load()
    with pytest.raises(CheckpointError, match=f"^--draft {name} is neither .*{told}"):
        draft_options(name)


@pytest.fixture
def silent(monkeypatch) -> Iterator[list[int]]:
    """A hub that closes each connection, which it counts."""
    listener = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
    asked: list[int] = []

    def close() -> None:
        while True:
            try:
                connection, (_, port) = listener.accept()
            except OSError:  # the listener is closed
                return
            asked.append(port)
            connection.close()

    thread = threading.Thread(target=close)
    thread.start()
    yield asked
    listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    listener.close()


def test_a_model_in_the_cache_needs_no_hub(cache, files, silent):
    of_model = cache / "models--a--b"
    (of_model / "refs").mkdir(parents=True)
    (of_model / "refs" / "main").write_text(COMMIT)
    (of_model / "snapshots").mkdir()
    files.rename(snapshot := of_model / "snapshots" / COMMIT)
    config = Source(name="a/b").config()
    for load in loads("a/b", config):
        load()
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model.safetensors in the hub's cache \(the hub"):
        loads("a/b", config)[-1]()
    # Once a minute, and the libraries would try each of the files that are missing six times.
    assert 1 <= len(silent) <= 2


def test_a_data_set_that_is_not_in_the_cache_is_asked_for_once(monkeypatch, cache, silent):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    told = "^data.path=a/b: there is no such directory .* the hub http://127.0.0.1:[0-9]+ does not"
    with pytest.raises(ConnectionLost, match=told):
        load_corpus(DataSpec(kind="hub", path="a/b:configuration"))
    # The library would ask six times, with pauses of up to eight seconds.
    assert len(silent) == 1


def test_a_data_set_in_the_cache_needs_no_hub(monkeypatch, tmp_path, cache, silent):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", sets := tmp_path / "sets")
    (folder := tmp_path / "b").mkdir()
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    load_corpus(DataSpec(kind="hub", path=str(folder)))
    # What the library leaves after a download has the name of the repository in its path.
    (made,) = (path.parent for path in sets.glob("*/*/*/*/dataset_info.json"))
    of_hub = sets / "a___b" / "default" / made.parts[-2] / made.name
    of_hub.parent.mkdir(parents=True)
    made.rename(of_hub)
    corpus = load_corpus(DataSpec(kind="hub", path="a/b"))
    assert [document.text for document in corpus.documents] == ["one", "two"]
    # The library alone would ask for 23 s.
    assert len(silent) == 1
    assert not datasets.config.HF_HUB_OFFLINE


@pytest.fixture
def hub(monkeypatch, files) -> Iterator[None]:
    """A hub that has the files."""
    with ThreadingHTTPServer(("127.0.0.1", 0), hub_of(files)) as server:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_full_disk_under_the_hub_s_cache_is_named(cache, files, hub):
    config = Source(name=str(files)).config()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for load in (*loads("a/b", config), partial(draft_options, "a/b")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            with pytest.raises(
                StorageError, match=f"^a/b cannot be .* no space left under {cache}"
            ):
                load()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for load in loads("a/b", config):
        load()
