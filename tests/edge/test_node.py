"""A process that simulates many clients reads, deals out and tokenizes their data once."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from fedsplit.data import load_corpus, tokenizer_to_json, train_tokenizer
from fedsplit.flower.node import Node
from fedsplit.flower.share import (
    Preparation,
    Share,
    own_corpora,
    partitions_of,
    share_of,
    texts_of,
)
from fedsplit.spec import RunSpec
from tests.edge.federation import spec_for, write_corpus

CLIENTS = 70


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    """Other tests of this process have filled the caches."""
    for cache in (partitions_of, own_corpora):
        cache.cache_clear()
    yield
    for cache in (partitions_of, own_corpora):
        cache.cache_clear()


def node(partition: int, data_path: str = "") -> Node:
    return Node(
        partition=partition,
        partitions=CLIENTS,
        data_path=data_path,
        device="cpu",
        tls_ca="",
        state_dir="",
        trunk_address="",
        trusts_runs=True,
    )


def preparation_of(run: RunSpec) -> Preparation:
    tokenizer = train_tokenizer(load_corpus(run.data), run.data.vocabulary)
    return Preparation(tokenizer=tokenizer_to_json(tokenizer), labels=())


def many(folder: Path, *words: str) -> RunSpec:
    run = spec_for(folder, f"clients={CLIENTS}", "sharding=iid", "data.held_out=0.5", *words)
    write = write_corpus(folder, documents=4 * CLIENTS)
    return replace(run, data=replace(run.data, path=str(write)))


def shares_of(run: RunSpec, preparation: Preparation) -> list[Share]:
    """Of all clients, asked for at once, as they are at the beginning of a round."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(lambda i: share_of(run, node(i), preparation), range(CLIENTS)))


def test_seventy_clients_partition_the_corpus_once_and_tokenize_a_share_once(
    tmp_path: Path,
) -> None:
    run = many(tmp_path)
    preparation = preparation_of(run)
    first = shares_of(run, preparation)
    again = shares_of(run, preparation)
    assert partitions_of.cache_info().misses == 1
    assert all(one is other for one, other in zip(first, again, strict=True))


def test_a_baseline_of_the_same_data_partitions_nothing_again(tmp_path: Path) -> None:
    run = many(tmp_path)
    central = replace(run, name="central", baseline="central")
    training, held_out = texts_of(central, node(0))
    for i in range(CLIENTS):
        assert texts_of(run, node(i)) == ((training[i],), (held_out[i],))
    assert partitions_of.cache_info().misses == 1


def test_only_one_corpus_is_kept(tmp_path: Path) -> None:
    for seed in range(3):
        texts_of(many(tmp_path, f"seed={seed}"), node(0))
    assert partitions_of.cache_info().currsize == 1


def test_a_client_with_its_own_data_reads_it_once(tmp_path: Path) -> None:
    run, own = many(tmp_path), write_corpus(tmp_path / "own")
    ((training,), _) = texts_of(run, node(3, str(own)))
    texts_of(run, node(3, str(own)))
    assert own_corpora.cache_info().misses == 1
    assert partitions_of.cache_info().misses == 0
    assert training.name == str(own)
