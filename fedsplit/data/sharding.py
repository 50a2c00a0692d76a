"""Sharding: which client holds which documents.

How documents are dealt is a table from kind to function; a new kind is one function more.
"""

import heapq
import random
import re
from collections.abc import Callable

from fedsplit.data.corpora import Corpus, Document
from fedsplit.errors import DataError
from fedsplit.spec import ShardingSpec

PIECE_CHARS = 200  # a heading alone is no sample: a piece has at least this many characters

Parcel = list[Document]  # documents that stay together
Dealer = Callable[[Corpus, int, random.Random], list[Parcel]]


def shard(corpus: Corpus, spec: ShardingSpec, num_clients: int, seed: int) -> tuple[Corpus, ...]:
    """Deal a corpus out to clients: every byte to exactly one of them, and none goes empty.

    `natural` gives whole groups to one client, largest first, each to the client with the fewest
    bytes. `iid` first cuts documents into pieces of a paragraph or more (otherwise a client
    would hold a few topics only), shuffles them and deals them in the same way, so that sizes
    differ by one piece at most.

    Args:
        corpus: What to deal out.
        spec: How to deal.
        num_clients: Among how many clients.
        seed: Decides the order; the same arguments give the same shards.

    Returns:
        One corpus per client, in the order of the clients.

    Raises:
        DataError: There are fewer parcels than clients; the text says how many are allowed.
    """
    order = random.Random(f"shard/{spec.kind}/{seed}")
    hands = _DEALERS[spec.kind](corpus, num_clients, order)
    return tuple(
        Corpus(name=f"{corpus.name}, client {client}", documents=tuple(hand))
        for client, hand in enumerate(hands)
    )


def shard_held_out(
    corpus: Corpus, spec: ShardingSpec, num_clients: int, seed: int
) -> tuple[Corpus, ...]:
    """Deal the held-out corpus as `shard` does, by pieces if it has too few groups.

    Every client needs something to evaluate on, and what a client is evaluated on changes no
    weight: the union of all parts is the same held-out corpus either way.

    Raises:
        DataError: There are fewer pieces than clients, too.
    """
    too_few = spec.kind == "natural" and len(corpus.groups) < num_clients
    return shard(corpus, ShardingSpec(kind="iid") if too_few else spec, num_clients, seed)


def _natural(corpus: Corpus, num_clients: int, order: random.Random) -> list[Parcel]:
    parcels = list(corpus.groups.values())
    _check(corpus, "natural", len(parcels), "groups", num_clients, "sharding=iid")
    order.shuffle(parcels)  # decides between groups of one size
    parcels.sort(key=_num_bytes, reverse=True)
    return _to_least_loaded(parcels, num_clients)


def _iid(corpus: Corpus, num_clients: int, order: random.Random) -> list[Parcel]:
    parcels = [[piece] for document in corpus.documents for piece in _pieces(document)]
    _check(corpus, "iid", len(parcels), "paragraphs", num_clients, "more data")
    order.shuffle(parcels)
    return _to_least_loaded(parcels, num_clients)


_DEALERS: dict[str, Dealer] = {"iid": _iid, "natural": _natural}


def _check(
    corpus: Corpus, kind: str, allowed: int, noun: str, num_clients: int, instead: str
) -> None:
    if allowed < num_clients:
        raise DataError(
            f"sharding={kind}: {allowed} {noun} of {corpus.name} allow at most {allowed} clients, "
            f"{num_clients} asked for; lower clients, or use {instead}"
        )


def _pieces(document: Document) -> list[Document]:
    """Cut after blank lines; joined, the pieces are the document again."""
    texts, text = [], ""
    for paragraph in re.split(r"(?<=\n\n)", document.text):
        text += paragraph
        if len(text.strip()) >= PIECE_CHARS:
            texts.append(text)
            text = ""
    if texts:
        texts[-1] += text
    return [Document(text=piece, group=document.group) for piece in texts or [text]]


def _to_least_loaded(parcels: list[Parcel], num_clients: int) -> list[Parcel]:
    """Each parcel in turn to the client with the fewest bytes (the first of several)."""
    hands: list[Parcel] = [[] for _ in range(num_clients)]
    loads = [(0, client) for client in range(num_clients)]
    for parcel in parcels:
        load, client = loads[0]
        hands[client] += parcel
        heapq.heapreplace(loads, (load + _num_bytes(parcel), client))
    return hands


def _num_bytes(parcel: Parcel) -> int:
    return sum(document.num_bytes for document in parcel)
