"""Shards are a partition, are level, and depend on their arguments alone."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.data import Corpus, Document, hold_out, load_corpus, shard, shard_held_out
from fedsplit.data.sharding import PIECE_CHARS
from fedsplit.errors import DataError
from fedsplit.spec import DataSpec, ShardingSpec

KINDS = ("iid", "natural")

# long enough to be cut, with blank lines in odd places
texts = st.lists(st.text("ab \n\u00e9", min_size=1, max_size=9), min_size=1, max_size=9).map(
    lambda words: "\n\n".join(word * 40 for word in words)
)
documents = st.builds(Document, text=texts.filter(str.strip), group=st.sampled_from("abcdefgh"))
corpora = st.builds(
    Corpus,
    name=st.just("sample"),
    documents=st.lists(documents, min_size=1, max_size=20).map(tuple),
)
cases = corpora.flatmap(
    lambda corpus: st.tuples(st.just(corpus), st.integers(1, len(corpus.groups)))
)


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


@pytest.mark.parametrize("kind", KINDS)
@given(case=cases, seed=st.integers(0, 3))
def test_shards_are_a_partition(kind, case, seed):
    corpus, num_clients = case
    shards = shard(corpus, ShardingSpec(kind=kind), num_clients, seed)
    assert len(shards) == num_clients
    assert all(part.num_bytes > 0 for part in shards)
    assert bytes_by_group(*shards) == bytes_by_group(corpus)


@given(case=cases)
def test_natural_deals_every_document_once_and_no_group_twice(case):
    corpus, num_clients = case
    shards = shard(corpus, ShardingSpec(kind="natural"), num_clients, seed=0)
    assert Counter(d for part in shards for d in part.documents) == Counter(corpus.documents)
    assert sum(len(part.groups) for part in shards) == len(corpus.groups)


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


@pytest.mark.parametrize("kind", KINDS)
@given(case=cases)
def test_sizes_differ_by_one_parcel_at_most(kind, case):
    corpus, num_clients = case
    shards = shard(corpus, ShardingSpec(kind=kind), num_clients, seed=0)
    sizes = [part.num_bytes for part in shards]
    pieces = [[piece] for part in shards for piece in part.documents]
    parcels = corpus.groups.values() if kind == "natural" else pieces
    largest = max(sum(document.num_bytes for document in parcel) for parcel in parcels)
    assert max(sizes) - min(sizes) <= largest


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_shards(kind):
    corpus = load_corpus(DataSpec())
    spec = ShardingSpec(kind=kind)
    assert shard(corpus, spec, 4, seed=1) == shard(corpus, spec, 4, seed=1)


def test_iid_depends_on_the_seed():
    corpus = load_corpus(DataSpec())
    first, second = (shard(corpus, ShardingSpec(kind="iid"), 4, seed) for seed in (0, 1))
    assert [part.sha256 for part in first] != [part.sha256 for part in second]


@pytest.mark.parametrize("kind", KINDS)
def test_embedded_shards_are_level(kind):
    shards = shard(load_corpus(DataSpec()), ShardingSpec(kind=kind), 4, seed=0)
    sizes = [part.num_bytes for part in shards]
    assert max(sizes) < 1.02 * min(sizes)


def test_every_iid_client_sees_the_large_topics():
    corpus = load_corpus(DataSpec())
    large = [g for g, members in corpus.groups.items() if members[0].num_bytes > 10_000]
    for part in shard(corpus, ShardingSpec(kind="iid"), 4, seed=0):
        assert set(large) <= set(part.groups)


@pytest.mark.parametrize(
    ("kind", "noun"), [("natural", "groups"), ("iid", "paragraphs")], ids=KINDS
)
def test_too_many_clients_says_how_many_are_allowed(kind, noun):
    documents = tuple(Document(text=f"text {i}", group=f"g{i}") for i in range(3))
    corpus = Corpus(name="sample", documents=documents)
    assert len(shard(corpus, ShardingSpec(kind=kind), 3, seed=0)) == 3
    message = f"sharding={kind}: 3 {noun} of sample allow at most 3 clients, 4 asked for; lower"
    with pytest.raises(DataError, match=message):
        shard(corpus, ShardingSpec(kind=kind), 4, seed=0)


@pytest.mark.parametrize("num_clients", [1, 4, 40], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_client_has_its_own_held_out_part(kind, num_clients):
    _, held = hold_out(load_corpus(DataSpec()), 0.1, seed=0)
    shards = shard_held_out(held, ShardingSpec(kind=kind), num_clients, seed=0)
    assert len(shards) == num_clients
    assert all(part.documents for part in shards)
    assert bytes_by_group(*shards) == bytes_by_group(held)


def test_held_out_topics_stay_whole_where_they_suffice():
    _, held = hold_out(load_corpus(DataSpec()), 0.1, seed=0)
    spec = ShardingSpec(kind="natural")
    assert shard_held_out(held, spec, 4, seed=0) == shard(held, spec, 4, seed=0)


def test_held_out_part_too_small_for_the_clients():
    held = Corpus(name="sample", documents=(Document(text="short", group="g"),))
    with pytest.raises(DataError, match="sharding=iid: 1 paragraphs of sample allow at most 1 cl"):
        shard_held_out(held, ShardingSpec(kind="natural"), 2, seed=0)
