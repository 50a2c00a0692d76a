"""What each kind of corpus reads, what it says when it cannot, and what is held out."""

import json
import random
import re
import resource
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedsplit.data import Corpus, Document, Turn, hold_out, labels_of, load_corpus
from fedsplit.data.corpora import paragraph_runs
from fedsplit.errors import DataError, StorageError
from fedsplit.spec import DataSpec

TEXTS = "sequence_classification"


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


def test_embedded_passages_are_of_the_six_largest_topics():
    topics = load_corpus(DataSpec()).documents
    largest = sorted(topics, key=lambda topic: -topic.num_bytes)[:6]
    corpus = load_corpus(DataSpec(), TEXTS)
    assert labels_of(corpus) == tuple(sorted(topic.group for topic in largest))
    whole = {topic.group: topic.text for topic in largest}
    assert all(document.text in whole[document.label] for document in corpus.documents)
    assert min(len(document.text) for document in corpus.documents) >= 100
    assert min(Counter(document.label for document in corpus.documents).values()) > 30


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


def test_links_are_followed_and_each_directory_is_read_once(tmp_path, caplog):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for path in (root / "z" / "own.txt", elsewhere / "deep" / "far.txt", root / "z" / "loop.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.stem)
    (root / "a").symlink_to("z")  # before z, which keeps its own name
    (root / "b").symlink_to(elsewhere)
    (root / "c.txt").symlink_to(elsewhere / "deep" / "far.txt")
    (root / "d.txt").symlink_to("nowhere")
    (root / "z" / "up").symlink_to(root)
    corpus = load_corpus(DataSpec(kind="text", path=str(root)))
    found = [document.group for document in corpus.documents]
    assert found == ["b/deep/far.txt", "c.txt", "z/loop.txt", "z/own.txt"]
    assert f"Skip {root / 'a'}: it is a link to {root / 'z'}, which is read already" in caplog.text
    assert f"Skip {root / 'z' / 'up'}: it is a link to {root}, which" in caplog.text
    assert f"Skip {root / 'd.txt'}: it is neither a file nor a directory" in caplog.text


def test_text_sub_directories_are_classes(tmp_path):
    for path in ("ham/a.txt", "ham/deep/b.txt", "spam/a.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    spec = DataSpec(kind="text", path=str(tmp_path))
    found = {d.group: d.label for d in load_corpus(spec, TEXTS).documents}
    assert found == {"ham/a.txt": "ham", "ham/deep/b.txt": "ham", "spam/a.txt": "spam"}
    assert labels_of(load_corpus(spec)) == ()
    (tmp_path / "stray.txt").write_text("of no class")
    with pytest.raises(DataError, match="stray.txt lies in no sub-directory and so has no class"):
        load_corpus(spec, TEXTS)


def test_a_text_file_names_no_classes(tmp_path):
    (tmp_path / "lines.txt").write_text("one\ntwo")
    spec = DataSpec(kind="text", path=str(tmp_path / "lines.txt"))
    with pytest.raises(DataError, match="is one file, and a text file names no classes; give a d"):
        load_corpus(spec, TEXTS)


def test_sha256_tells_documents_apart():
    one = Document(text="ab", group="g")
    image = Document(text="", group="g", pixels=(0.5, 0.25))
    others = {
        "one text": (one,),
        "two texts": tuple(Document(text=t, group="g") for t in "ab"),
        "a label": (replace(one, label="x"),),
        "another label": (replace(one, label="y"),),
        "an image": (image,),
        "another image": (replace(image, pixels=(0.5, 0.75)),),
    }
    found = {Corpus(name="a", documents=documents).sha256 for documents in others.values()}
    assert len(found) == len(others)


@given(text=st.text("a \n", max_size=40), min_chars=st.integers(1, 9))
@example(text="a" + "\n" * 100_000 + "b", min_chars=2)
def test_runs_of_paragraphs_are_the_shortest_that_are_long_enough(text, min_chars):
    runs, run = [], ""
    for paragraph in re.split(r"(?<=\n\n)", text):
        run += paragraph
        if paragraph.strip() and len(run.strip()) >= min_chars:
            runs.append(run)
            run = ""
    assert paragraph_runs(text, min_chars) == (runs, run)


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
    "chat": ('{"messages": []}', "no field 'text': found 'messages'; set data.field=messages to"),
    "number": ('{"text": 3}', r"line 2, field 'text' is not a string: found '3' \(int\); set data"),
    "null": ('{"text": null}', r"line 2, field 'text' is not a string: found 'None' \(NoneType\)"),
    "surrogate": ('{"text": "\\ud800"}', "line 2, field 'text' is not Unicode text"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_jsonl_names_the_bad_line(tmp_path, line, message):
    path = tmp_path / "docs.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(DataError, match=f"docs.jsonl, .*{message}"):
        load_corpus(DataSpec(kind="jsonl", path=str(path)))


LABELS = {
    "text": (["ham", "spam"], ("ham", "spam")),
    "number": ([1, 0], ("0", "1")),
    "boolean": ([True, False], ("False", "True")),
}


@pytest.mark.parametrize(("values", "labels"), LABELS.values(), ids=LABELS)
def test_jsonl_reads_the_class(tmp_path, values, labels):
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(json.dumps({"text": "t", "kind": value}) for value in values))
    spec = DataSpec(kind="jsonl", path=str(path), label="kind")
    corpus = load_corpus(spec, TEXTS)
    assert [document.label for document in corpus.documents] == [str(value) for value in values]
    assert labels_of(corpus) == labels
    assert labels_of(load_corpus(spec)) == ()


BAD_LABELS = {
    "missing": ('{"text": "t"}', "line 2 has no field 'label': found 'text'; set data.label to"),
    "empty": ('{"text": "t", "label": ""}', r"line 2, field 'label' is no class: found '' \(str\)"),
    "null": ('{"text": "t", "label": null}', r"line 2, field 'label' is no class: found 'None'"),
    "fraction": ('{"text": "t", "label": 0.5}', r"is no class: found '0.5' \(float\); set data.l"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LABELS.values(), ids=BAD_LABELS)
def test_jsonl_names_the_line_without_a_class(tmp_path, line, message):
    path = tmp_path / "docs.jsonl"
    path.write_text(f'{{"text": "fine", "label": 1}}\n{line}\n')
    with pytest.raises(DataError, match=message):
        load_corpus(DataSpec(kind="jsonl", path=str(path)), TEXTS)


# --- digits ----------------------------------------------------------------------------------


def test_digits_are_images_with_a_class():
    pytest.importorskip("sklearn")
    corpus = load_corpus(DataSpec(kind="digits"), "image_classification")
    assert len(corpus.documents) == len(corpus.groups) == 1797
    assert labels_of(corpus) == tuple("0123456789")
    assert corpus.num_bytes == 1797 * 64
    pixels = {pixel for document in corpus.documents for pixel in document.pixels}
    assert pixels == {step / 16 for step in range(17)}
    assert {type(pixel) for pixel in pixels} == {float}


def test_digits_without_the_extra_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'fedsplit\[images\]'"):
        load_corpus(DataSpec(kind="digits"), "image_classification")


# --- what cannot be read ---------------------------------------------------------------------

GARBAGE = {
    "empty": (b"", "holds no text; set data.path to a file or directory with text"),
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


def test_hub_reads_the_class(local_dataset):
    spec = DataSpec(kind="hub", path=str(local_dataset), label="id")
    assert labels_of(load_corpus(spec, TEXTS)) == ("1", "2")
    with pytest.raises(DataError, match="has no field 'label': found 'text', 'id'; set data.label"):
        load_corpus(replace(spec, label="label"), TEXTS)


HUB_ERRORS = {
    "no_field": ({"field": "body"}, "has no field 'body': found 'text', 'id'"),
    "not_text": ({"field": "id"}, r"row 1, field 'id' is not a string: found '1' \(int\)"),
    "no_split": ({"split": "dev"}, "with data.split=dev cannot be loaded: "),
}


@pytest.mark.parametrize(("changes", "message"), HUB_ERRORS.values(), ids=HUB_ERRORS)
def test_hub_errors_are_ours(local_dataset, changes, message):
    with pytest.raises(DataError, match=message):
        load_corpus(DataSpec(kind="hub", path=str(local_dataset), **changes))


# datasets leaves the file of a CSV reader to the collector.
left_open = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning"
)


@left_open
@pytest.mark.parametrize("kind", ["parquet", "csv", "saved"])
def test_tables_are_read(local_dataset, tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "NA", " ", "three"], "label": [1, 0, 1, 0]})
    path = tmp_path / "tables" / f"a.{kind}"
    path.parent.mkdir()
    write = {"parquet": rows.to_parquet, "csv": rows.to_csv, "saved": rows.save_to_disk}[kind]
    write(str(path))
    for source in (path, path.parent) if kind != "saved" else (path,):
        corpus = load_corpus(DataSpec(kind=kind, path=str(source)), TEXTS)
        found = [(document.text, document.label) for document in corpus.documents]
        assert found == [("one", "1"), ("NA", "0"), ("three", "0")]


def test_a_saved_set_of_splits_has_the_one_that_is_asked_for(tmp_path):
    datasets = pytest.importorskip("datasets")
    chat = [{"role": "user", "content": "one"}]
    rows = datasets.Dataset.from_dict({"messages": [chat]})
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "set"))
    spec = DataSpec(kind="saved", path=str(tmp_path / "set"), split="test", field="messages")
    (document,) = load_corpus(spec).documents
    assert document.messages == (Turn(role="user", content="one"),)
    with pytest.raises(DataError, match="has no split 'train': found test; set data.split"):
        load_corpus(replace(spec, split="train"))


def test_a_directory_without_tables_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has no file whose name ends with \.parquet"):
        load_corpus(DataSpec(kind="parquet", path=str(tmp_path)))


@left_open
def test_a_full_disk_under_the_cache_is_told_from_bad_data(local_dataset, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "word\n" * 100_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        with pytest.raises(StorageError, match=f"{tmp_path / 'cache'}, where datasets keeps a cop"):
            load_corpus(DataSpec(kind="csv", path=str(path)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


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


def test_a_file_of_one_line_is_told_to_have_more(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("once upon a time")
    corpus = load_corpus(DataSpec(kind="text", path=str(path)), "causal_lm")
    with pytest.raises(DataError, match="with 1 group leaves .* each line of a single text file"):
        hold_out(corpus, 0.1, seed=0)


@given(
    counts=st.lists(st.integers(1, 30), min_size=2, max_size=5).filter(lambda c: max(c) > 1),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 9),
)
def test_hold_out_takes_its_share_of_every_label(counts, share, seed):
    documents = tuple(
        Document(text=f"{label} {i}", group="g", label=str(label))
        for label, count in enumerate(counts)
        for i in range(count)
    )
    train, held = hold_out(Corpus(name="sample", documents=documents), share, seed)
    assert sorted([*train.documents, *held.documents], key=documents.index) == [*documents]
    in_train, in_held = (Counter(int(d.label) for d in side.documents) for side in (train, held))
    for label, count in enumerate(counts):
        assert in_train[label] >= 1
        assert in_held[label] >= (count > 1)
        assert abs(in_held[label] - share * count) <= 1 or in_held[label] in (1, count - 1)


def test_hold_out_needs_two_documents_of_a_label():
    documents = tuple(Document(text=label, group=label, label=label) for label in "abc")
    with pytest.raises(DataError, match="leaves one side empty; .* or 2 documents of a label"):
        hold_out(Corpus(name="sample", documents=documents), 0.3, seed=0)
