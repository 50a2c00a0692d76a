"""Shards are a partition, as level or as skewed as asked, and depend on their arguments alone."""

from collections import Counter
from itertools import groupby

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedsplit.data import Corpus, Document, hold_out, load_corpus, shard, shard_held_out
from fedsplit.data.sharding import PIECE_CHARS
from fedsplit.errors import DataError
from fedsplit.spec import DataSpec, ShardingSpec

EMBEDDED = load_corpus(DataSpec())
LEVEL = {kind: ShardingSpec(kind=kind) for kind in ("iid", "natural")}
SPECS = LEVEL | {
    "iid-skew": ShardingSpec(kind="iid", skew=1.5),
    "dirichlet": ShardingSpec(kind="dirichlet", alpha=0.3),
    "dirichlet-extreme": ShardingSpec(kind="dirichlet", alpha=1e-6),
    "pathological": ShardingSpec(kind="pathological", classes=30),
    "shards": ShardingSpec(kind="shards"),
    "shards-skew": ShardingSpec(kind="shards", shards=3, skew=0.5),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
level = pytest.mark.parametrize("spec", LEVEL.values(), ids=LEVEL)

# long enough to be cut, with blank lines in odd places
texts = st.lists(st.text("ab \n\u00e9", min_size=1, max_size=9), min_size=1, max_size=9).map(
    lambda words: "\n\n".join(word * 40 for word in words)
)
groups = st.sampled_from("abcdefgh")
plain = st.builds(Document, text=texts.filter(str.strip), group=groups)
labelled = st.builds(Document, text=texts, group=groups, label=st.sampled_from("xyz"))


def corpora_of(documents: st.SearchStrategy[Document]) -> st.SearchStrategy[Corpus]:
    dealt = st.lists(documents, min_size=1, max_size=20).map(tuple)
    return st.builds(Corpus, name=st.just("sample"), documents=dealt)


corpora = corpora_of(plain)
cases = corpora.flatmap(
    lambda corpus: st.tuples(st.just(corpus), st.integers(1, len(corpus.groups)))
)


def labelled_corpus(counts: dict[str, int]) -> Corpus:
    """So many examples of each label, of one to three paragraphs, not sorted by label."""
    turns = sorted((number, label) for label, count in counts.items() for number in range(count))
    documents = []
    for number, label in turns[1:] + turns[:1]:
        text = f"example {number} of {label}; " * 20 + "\n\n"
        group = f"{label}{number}"
        documents.append(Document(text=text * (1 + number % 3), group=group, label=label))
    return Corpus(name="sample", documents=tuple(documents))


def sized_corpus(**sizes: list[int]) -> Corpus:
    """A group of documents of one paragraph and of these sizes for each name."""
    documents = [
        Document(text="x" * size, group=group) for group, some in sizes.items() for size in some
    ]
    return Corpus(name="sample", documents=tuple(documents))


def bytes_by_group(*corpora: Corpus) -> Counter:
    """How often each byte occurs in each group: what no sharding may change."""
    return sum(
        (
            Counter((document.group, byte) for byte in document.text.encode())
            for corpus in corpora
            for document in corpus.documents
        ),
        Counter(),
    )


def label_counts(part: Corpus) -> Counter:
    return Counter(document.label for document in part.documents)


def num_items(corpus: Corpus) -> int:
    """How many pieces or examples there are to deal: what one iid client gets of them."""
    return len(shard(corpus, ShardingSpec(kind="iid"), 1, seed=0)[0].documents)


def allowed(corpus: Corpus, spec: ShardingSpec) -> int:
    if spec.kind == "natural":
        return len(corpus.groups)
    return num_items(corpus) // (spec.shards if spec.kind == "shards" else 1)


# --- of every kind ----------------------------------------------------------------------------

WITHOUT_LABELS_TO_FIT = {name: spec for name, spec in SPECS.items() if spec.kind != "pathological"}


@pytest.mark.parametrize("spec", WITHOUT_LABELS_TO_FIT.values(), ids=WITHOUT_LABELS_TO_FIT)
@settings(max_examples=25)
@given(corpus=corpora | corpora_of(labelled), data=st.data(), seed=st.integers(0, 3))
def test_shards_are_a_partition(spec, corpus, data, seed):
    most = allowed(corpus, spec)
    assume(most > 0)
    num_clients = data.draw(st.integers(1, most), "clients")
    shards = shard(corpus, spec, num_clients, seed)
    assert len(shards) == num_clients
    assert all(part.documents for part in shards)
    assert bytes_by_group(*shards) == bytes_by_group(corpus)
    with pytest.raises(DataError, match=f"at most {most} clients, {most + 1} asked for; lower"):
        shard(corpus, spec, most + 1, seed)


@every_spec
@settings(max_examples=20)
@given(num_clients=st.integers(1, 3), seed=st.integers(0, 3))
def test_examples_are_never_cut(spec, num_clients, seed):
    corpus = labelled_corpus({f"label {number}": 3 for number in range(30)})
    shards = shard(corpus, spec, num_clients, seed)
    assert Counter(d for part in shards for d in part.documents) == Counter(corpus.documents)
    assert all(part.documents for part in shards)


@every_spec
def test_same_seed_same_shards_and_another_seed_others(spec):
    first, again, other = (shard(EMBEDDED, spec, 4, seed) for seed in (1, 1, 2))
    assert first == again
    if spec.kind != "natural":  # whose seed decides between groups of one size only
        assert [part.sha256 for part in first] != [part.sha256 for part in other]


@every_spec
@pytest.mark.parametrize("num_clients", [1, 4, 40], ids=str)
def test_every_client_has_its_own_held_out_part(spec, num_clients):
    _, held = hold_out(EMBEDDED, 0.1, seed=0)
    shards = shard_held_out(held, spec, num_clients, seed=0)
    assert len(shards) == num_clients
    assert all(part.documents for part in shards)
    assert bytes_by_group(*shards) == bytes_by_group(held)


@pytest.mark.parametrize("kind", sorted({spec.kind for spec in SPECS.values()} - {"natural"}))
def test_held_out_parts_are_level_whatever_the_kind(kind):
    corpus = labelled_corpus({"a": 40, "b": 42})
    parts = shard_held_out(corpus, ShardingSpec(kind=kind, classes=1, shards=9), 4, seed=0)
    assert sorted(len(part.documents) for part in parts) == [20, 20, 21, 21]
    assert all(label_counts(part)["a"] in range(5, 16) for part in parts)


def test_held_out_topics_stay_whole_where_they_suffice():
    _, held = hold_out(EMBEDDED, 0.1, seed=0)
    spec = ShardingSpec(kind="natural")
    assert shard_held_out(held, spec, 4, seed=0) == shard(held, spec, 4, seed=0)


def test_held_out_part_too_small_for_the_clients():
    held = Corpus(name="sample", documents=(Document(text="short", group="g"),))
    with pytest.raises(DataError, match="sharding=iid: 1 paragraphs of sample allow at most 1 cl"):
        shard_held_out(held, ShardingSpec(kind="natural"), 2, seed=0)


TOO_MANY = {
    "natural": "3 groups of sample allow at most 3 clients, 4 asked for; lower clients, or use "
    "sharding=iid",
    "iid": "3 paragraphs of sample allow at most 3 clients, 4 asked for; lower clients",
    "dirichlet": "3 paragraphs of sample allow at most 3 clients, 4 asked for; lower",
    "shards": "3 paragraphs of sample allow at most 1 clients, 4 asked for; lower clients, or use "
    "a lower sharding.shards",
    "pathological": "the 3 paragraphs of sample are too few for 4 clients with 2 labels each; "
    "lower clients or sharding.classes",
    "partitioner": "3 paragraphs of sample allow at most 3 clients, 4 asked for; lower clients",
}


# So many clients do not fit into memory, so nothing is made for each of them.
@pytest.mark.parametrize("clients", [4, 10**15])
@pytest.mark.parametrize(("kind", "message"), TOO_MANY.items(), ids=TOO_MANY)
def test_too_many_clients_says_how_many_are_allowed(kind, message, clients):
    documents = tuple(Document(text=f"text {i}", group=f"g{i}") for i in range(3))
    corpus = Corpus(name="sample", documents=documents)
    spec = ShardingSpec(kind=kind, target="a.B" if kind == "partitioner" else "")
    message = message.replace("4", str(clients))
    with pytest.raises(DataError, match=f"^sharding={kind}: {message}"):
        shard(corpus, spec, clients, seed=0)


# --- natural and iid --------------------------------------------------------------------------


@settings(max_examples=50)
@given(case=cases)
def test_natural_deals_every_document_once_and_no_group_twice(case):
    corpus, num_clients = case
    shards = shard(corpus, ShardingSpec(kind="natural"), num_clients, seed=0)
    assert Counter(d for part in shards for d in part.documents) == Counter(corpus.documents)
    assert sum(len(part.groups) for part in shards) == len(corpus.groups)


@settings(max_examples=50)
@given(corpus=corpora)
def test_iid_never_cuts_below_a_paragraph(corpus):
    (everything,) = shard(corpus, ShardingSpec(kind="iid"), 1, seed=0)
    whole = {document.text for document in corpus.documents}
    for piece in everything.documents:
        assert len(piece.text.strip()) >= PIECE_CHARS or piece.text in whole


def test_iid_cuts_after_blank_lines():
    long, heading, tail = "long " * 50 + "\n\n", "A heading\n\n\n", "the end"
    corpus = Corpus(name="s", documents=(Document(text=heading + long + long + tail, group="g"),))
    (everything,) = shard(corpus, ShardingSpec(kind="iid"), 1, seed=0)
    assert {piece.text for piece in everything.documents} == {heading + long, long + tail}


@level
@settings(max_examples=50)
@given(case=cases)
def test_sizes_differ_by_one_parcel_at_most(spec, case):
    corpus, num_clients = case
    shards = shard(corpus, spec, num_clients, seed=0)
    sizes = [part.num_bytes for part in shards]
    pieces = [[piece] for part in shards for piece in part.documents]
    parcels = corpus.groups.values() if spec.kind == "natural" else pieces
    largest = max(sum(document.num_bytes for document in parcel) for parcel in parcels)
    assert max(sizes) - min(sizes) <= largest


@level
def test_embedded_shards_are_level(spec):
    sizes = [part.num_bytes for part in shard(EMBEDDED, spec, 4, seed=0)]
    assert max(sizes) < 1.02 * min(sizes)


def test_every_iid_client_sees_the_large_topics():
    large = [g for g, members in EMBEDDED.groups.items() if members[0].num_bytes > 10_000]
    for part in shard(EMBEDDED, ShardingSpec(kind="iid"), 4, seed=0):
        assert set(large) <= set(part.groups)


@given(num_examples=st.integers(7, 60), num_clients=st.integers(1, 7))
def test_examples_are_shared_out_by_number_however_long_they_are(num_examples, num_clients):
    corpus = labelled_corpus({"a": num_examples})
    sizes = [len(p.documents) for p in shard(corpus, ShardingSpec(kind="iid"), num_clients, seed=0)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("kind", ["iid", "shards"])
@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0, 2.0], ids=str)
def test_sizes_go_by_the_skew(kind, skew):
    spec = ShardingSpec(kind=kind, skew=skew)
    sizes = [part.num_bytes for part in shard(EMBEDDED, spec, 5, seed=0)]
    shares = [(client + 1) ** -skew for client in range(5)]
    largest = max(d.num_bytes for d in shard(EMBEDDED, ShardingSpec(kind="iid"), 1, 0)[0].documents)
    for size, share in zip(sizes, shares, strict=True):
        assert abs(size - EMBEDDED.num_bytes * share / sum(shares)) <= spec.shards * largest


# --- by label ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_dirichlet_of_a_large_alpha_divides_each_label_evenly(seed):
    spec = ShardingSpec(kind="dirichlet", alpha=1e9)
    for part in shard(labelled_corpus({"a": 40, "b": 8, "c": 20}), spec, 4, seed):
        for label, count in {"a": 10, "b": 2, "c": 5}.items():
            assert abs(label_counts(part)[label] - count) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_dirichlet_of_a_small_alpha_gives_each_label_to_one_client(seed):
    spec = ShardingSpec(kind="dirichlet", alpha=1e-9)
    parts = shard(labelled_corpus(dict.fromkeys("abcdefghij", 9)), spec, 2, seed)
    assert all(set(label_counts(part).values()) <= {9, 8, 1} for part in parts)
    assert sum(len(label_counts(part)) for part in parts) in (10, 11)  # 11: one moved, none empty


def test_dirichlet_moves_one_item_to_each_client_that_got_nothing():
    spec = ShardingSpec(kind="dirichlet", alpha=1e-9)
    parts = shard(sized_corpus(a=[400, 210, 300, 500, 220]), spec, 4, seed=0)
    assert sorted(part.num_bytes for part in parts) == [210, 220, 300, 900]


def test_dirichlet_takes_what_it_moves_from_the_client_with_most():
    corpus = sized_corpus(a=[400] * 5, b=[210] * 2)
    spec = ShardingSpec(kind="dirichlet", alpha=1e-9)
    dealt = {
        tuple(sorted(part.num_bytes for part in shard(corpus, spec, 3, seed))) for seed in range(10)
    }
    assert dealt == {(400, 420, 1600), (210, 210, 2000)}  # two clients, or one, had everything


def test_dirichlet_divides_text_by_its_bytes():
    spec = ShardingSpec(kind="dirichlet", alpha=1e9)
    parts = shard(sized_corpus(a=[10_000] + [250] * 40), spec, 2, seed=0)
    assert [part.num_bytes for part in parts] == [10_000, 10_000]


@pytest.mark.parametrize("kind", ["shards", "pathological"])
def test_no_shard_is_empty_however_unequal_texts_are(kind):
    corpus = sized_corpus(a=[210, 9_000, 210, 210], b=[210, 210, 210, 9_000])
    parts = shard(corpus, ShardingSpec(kind=kind, classes=2, shards=2), 4, seed=0)
    assert [len(part.documents) for part in parts] == [2, 2, 2, 2]


@settings(max_examples=60)
@given(
    labels=st.integers(1, 8),
    num_clients=st.integers(1, 6),
    classes=st.integers(1, 8),
    more=st.integers(0, 5),
    seed=st.integers(0, 5),
)
def test_pathological_clients_have_so_many_labels_and_every_label_has_somebody(
    labels, num_clients, classes, more, seed
):
    assume(classes <= labels <= classes * num_clients)
    corpus = labelled_corpus({f"label {n}": num_clients + more + n for n in range(labels)})
    spec = ShardingSpec(kind="pathological", classes=classes)
    parts = shard(corpus, spec, num_clients, seed)
    assert {len(label_counts(part)) for part in parts} == {classes}
    assert Counter(d for part in parts for d in part.documents) == Counter(corpus.documents)
    takers = Counter(label for part in parts for label in label_counts(part))
    assert max(takers.values()) - min(takers.values()) <= 2
    for label in takers:
        counts = [label_counts(part)[label] for part in parts if label in label_counts(part)]
        assert max(counts) - min(counts) <= 1


def test_pathological_spares_a_label_with_few_examples():
    corpus = labelled_corpus({"rare": 1, "a": 9, "b": 9})
    parts = shard(corpus, ShardingSpec(kind="pathological", classes=2), 3, seed=0)
    assert [len(label_counts(part)) for part in parts] == [2, 2, 2]
    assert sum("rare" in label_counts(part) for part in parts) == 1


REFUSED = {
    "more labels than there are": (
        ShardingSpec(kind="pathological", classes=4),
        "sharding.classes=4, but sample has 3 labels; lower it",
    ),
    "labels for nobody": (
        ShardingSpec(kind="pathological", classes=1),
        "2 clients with 1 labels each leave some of the 3 labels of sample to no client; "
        "set sharding.classes to 2 or more",
    ),
}


@pytest.mark.parametrize(("spec", "message"), REFUSED.values(), ids=REFUSED)
def test_labels_that_cannot_be_dealt_are_refused(spec, message):
    with pytest.raises(DataError, match=message):
        shard(labelled_corpus({"a": 5, "b": 5, "c": 5}), spec, 2, seed=0)


@pytest.mark.parametrize("seed", range(3))
def test_ten_labels_in_two_shards_each_as_in_the_paper(seed):
    corpus = labelled_corpus(dict.fromkeys("abcdefghij", 12))
    parts = shard(corpus, ShardingSpec(kind="shards", shards=2), 10, seed)
    for part in parts:
        assert sorted(label_counts(part).values()) in ([6, 6], [12])


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    num_clients=st.integers(1, 5),
    shards=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_a_client_has_equal_runs_of_the_sorted_line(counts, num_clients, shards, seed):
    corpus = labelled_corpus({f"label {n}": count for n, count in enumerate(counts)})
    num_shards, total = num_clients * shards, len(corpus.documents)
    assume(total >= num_shards)
    spec = ShardingSpec(kind="shards", shards=shards)
    parts = shard(corpus, spec, num_clients, seed)
    owner = {d: client for client, part in enumerate(parts) for d in part.documents}
    line = sorted(corpus.documents, key=lambda document: document.label)
    runs = Counter(client for client, _ in groupby(owner[document] for document in line))
    assert max(runs.values()) <= shards
    for part in parts:
        assert abs(len(part.documents) - shards * total / num_shards) < shards
