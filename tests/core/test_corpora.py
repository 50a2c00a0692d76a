"""What each kind of corpus reads, what it says when it cannot, and what is held out."""

import json
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.data import Corpus, Document, hold_out, load_corpus
from fedsplit.errors import DataError
from fedsplit.spec import DataSpec


def corpus_of(*sizes: int) -> Corpus:
    documents = tuple(Document(text="x" * n, group=f"g{i}") for i, n in enumerate(sizes))
    return Corpus(name="sample", documents=documents)


# --- embedded --------------------------------------------------------------------------------


def test_embedded_has_each_paragraph_once():
    corpus = load_corpus(DataSpec())
    assert corpus.name.startswith("CPython 3.")
    assert len(corpus.groups) == len(corpus.documents) > 50
    assert corpus.num_bytes > 300_000
    paragraphs = [p for d in corpus.documents for p in d.text.split("\n\n") if p.strip()]
    assert len(paragraphs) == len(set(paragraphs))


def test_embedded_is_the_same_every_time():
    first, second = load_corpus(DataSpec()), load_corpus(DataSpec())
    assert first == second
    assert first.sha256 == second.sha256


def test_embedded_without_pydoc_data_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="this Python has none; install the full standard library"):
        load_corpus(DataSpec())


# --- text ------------------------------------------------------------------------------------


def test_text_file_has_a_document_per_line(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeffone\r\n\n  two\u2028still two\n \t\nthr\u00e9e".encode())
    corpus = load_corpus(DataSpec(kind="text", path=str(path)))
    assert corpus.documents == (
        Document(text="one", group="lines.txt:1"),
        Document(text="  two\u2028still two", group="lines.txt:3"),
        Document(text="thr\u00e9e", group="lines.txt:5"),
    )
    assert corpus.num_bytes == 3 + 17 + 6


def test_text_directory_has_a_document_per_file(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "deep.txt").write_text("deep\n\nwater\n")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "empty.md").write_text("\n")
    (tmp_path / ".hidden" / "config").write_bytes(b"\xff")
    corpus = load_corpus(DataSpec(kind="text", path=str(tmp_path)))
    assert corpus.documents == (
        Document(text="first", group="a.md"),
        Document(text="deep\n\nwater\n", group="b/deep.txt"),
    )


def test_sha256_tells_documents_apart():
    one = Corpus(name="a", documents=(Document(text="ab", group="g"),))
    two = Corpus(name="a", documents=tuple(Document(text=t, group="g") for t in "ab"))
    assert one.sha256 != two.sha256


# --- jsonl -----------------------------------------------------------------------------------


def test_jsonl_reads_one_field(tmp_path):
    path = tmp_path / "docs.jsonl"
    lines = [{"body": "one", "id": 1}, {"body": "tw\u00f6\nlines"}, {"body": " "}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    corpus = load_corpus(DataSpec(kind="jsonl", path=str(path), field="body"))
    assert corpus.documents == (
        Document(text="one", group="docs.jsonl:1"),
        Document(text="tw\u00f6\nlines", group="docs.jsonl:2"),
    )


BAD_LINES = {
    "not_json": ("{text: 1}", r"line 2 is not JSON: found '{text: 1}'; write one object per line"),
    "long": ("x" * 99, r"line 2 is not JSON: found 'x{40}\.\.\.'"),
    "too_deep": ("[" * 100_000, "line 2 is not JSON"),
    "list": ("[1, 2]", r"line 2 is not a JSON object: found '\[1, 2\]'"),
    "other_field": ('{"a": "", "b": ""}', "line 2 has no field 'text': found 'a', 'b'; set data.f"),
    "no_field": ("{}", "line 2 has no field 'text': found none"),
    "number": ('{"text": 3}', r"line 2, field 'text' is not a string: found '3' \(int\); set data"),
    "null": ('{"text": null}', r"line 2, field 'text' is not a string: found 'None' \(NoneType\)"),
    "surrogate": ('{"text": "\\ud800"}', "line 2, field 'text' holds half a surrogate pair"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_jsonl_names_the_bad_line(tmp_path, line, message):
    path = tmp_path / "docs.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(DataError, match=f"docs.jsonl, {message}"):
        load_corpus(DataSpec(kind="jsonl", path=str(path)))


# --- what cannot be read ---------------------------------------------------------------------

GARBAGE = {
    "empty": (b"", "holds no text; data.path must name something with words in it"),
    "blank": (b"\n \n\t\n", "holds no text"),
    "binary": (b"ok\n\xff\xfe\x00", "is not UTF-8 text: found byte 0xff at offset 3; convert it"),
    "zeros": (b"ok\0\0", "is not UTF-8 text: found byte 0x00 at character 2; convert it"),
}


@pytest.mark.parametrize("kind", ["text", "jsonl"])
@pytest.mark.parametrize(("content", "message"), GARBAGE.values(), ids=GARBAGE)
def test_unusable_file_is_one_clear_error(tmp_path, kind, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path} {message}"):
        load_corpus(DataSpec(kind=kind, path=str(path)))


def test_bad_file_in_a_directory_is_named(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(DataError, match="photo.png is not UTF-8 text: found byte 0x89 at offset 0"):
        load_corpus(DataSpec(kind="text", path=str(tmp_path)))


def test_empty_directory(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path} holds no text"):
        load_corpus(DataSpec(kind="text", path=str(tmp_path)))


def test_jsonl_of_a_directory(tmp_path):
    with pytest.raises(DataError, match="is a directory; data=jsonl reads one file"):
        load_corpus(DataSpec(kind="jsonl", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("kind", "needs"), [("text", "a file or directory"), ("jsonl", "a file$")], ids=str
)
def test_missing_path(kind, needs):
    with pytest.raises(DataError, match=rf"data.path=no/such does not exist \(.*needs {needs}"):
        load_corpus(DataSpec(kind=kind, path="no/such"))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that fails to read")
def test_file_that_cannot_be_read():
    with pytest.raises(DataError, match="/proc/self/mem cannot be read: Input/output error; check"):
        load_corpus(DataSpec(kind="text", path="/proc/self/mem"))


# --- hub -------------------------------------------------------------------------------------


def test_hub_without_the_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'fedsplit\[hub\]'"):
        load_corpus(DataSpec(kind="hub", path="some/name"))


@pytest.fixture
def local_dataset(tmp_path, monkeypatch) -> Path:
    """A data set as a directory, which `datasets` loads like a hub id but without a network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"text": "one", "id": 1}, {"text": "two", "id": 2}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_hub_loads_a_split(local_dataset):
    corpus = load_corpus(DataSpec(kind="hub", path=str(local_dataset)))
    assert [document.text for document in corpus.documents] == ["one", "two"]
    assert len(corpus.groups) == 2


HUB_ERRORS = {
    "no_field": ({"field": "body"}, "has no field 'body': found 'text', 'id'"),
    "not_text": ({"field": "id"}, r"row 1 is not a string: found '1' \(int\)"),
    "no_split": ({"split": "dev"}, "with data.split=dev cannot be loaded: "),
}


@pytest.mark.parametrize(("changes", "message"), HUB_ERRORS.values(), ids=HUB_ERRORS)
def test_hub_errors_are_ours(local_dataset, changes, message):
    with pytest.raises(DataError, match=message):
        load_corpus(DataSpec(kind="hub", path=str(local_dataset), **changes))


# --- holding out -----------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 500), min_size=2, max_size=30),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 9),
)
def test_hold_out_splits_whole_groups(sizes, share, seed):
    corpus = corpus_of(*sizes)
    train, held = hold_out(corpus, share, seed)
    assert train.documents and held.documents
    assert not set(train.groups) & set(held.groups)
    assert set(train.documents) | set(held.documents) == set(corpus.documents)
    assert held.num_bytes <= max(share * corpus.num_bytes, min(sizes))
    assert (train, held) == hold_out(corpus, share, seed)


def test_hold_out_keeps_the_documents_of_a_group_together():
    names = random.Random(0).choices("abcdef", k=60)
    documents = tuple(Document(text=f"document {i}", group=g) for i, g in enumerate(names))
    train, held = hold_out(Corpus(name="sample", documents=documents), 0.3, seed=0)
    assert held.documents
    assert not set(train.groups) & set(held.groups)


def test_hold_out_of_the_embedded_corpus_is_near_its_share():
    corpus = load_corpus(DataSpec())
    shares = [hold_out(corpus, 0.1, seed)[1].num_bytes / corpus.num_bytes for seed in range(5)]
    assert all(0.08 < share <= 0.1 for share in shares)
    assert len({hold_out(corpus, 0.1, seed)[1].sha256 for seed in range(5)}) == 5


@pytest.mark.parametrize("share", [0.0, 1.0], ids=str)
def test_hold_out_refuses_an_empty_side(share):
    with pytest.raises(
        DataError, match=f"data.held_out={share} of sample with 2 groups leaves one"
    ):
        hold_out(corpus_of(3, 4), share, seed=0)


def test_hold_out_needs_two_groups():
    with pytest.raises(DataError, match="data.held_out=0.1 of sample with 1 group leaves one side"):
        hold_out(corpus_of(3), 0.1, seed=0)
