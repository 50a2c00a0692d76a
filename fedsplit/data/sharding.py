"""Sharding: which client holds which documents.

How documents are dealt is a table from kind to function; a new kind is one function more. What is
dealt are items: a document with a label is an example and is never cut, one without is cut into
pieces of a paragraph or more. An example counts as one, a piece by its bytes.
"""

import heapq
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from fedsplit.data.corpora import Corpus, Document
from fedsplit.data.partitioners import partition
from fedsplit.errors import DataError
from fedsplit.spec import ShardingSpec

PIECE_CHARS = 200  # a heading alone is no sample: a piece has at least this many characters

Parcel = list[Document]  # documents that stay together
Dealer = Callable[[Corpus, ShardingSpec, int, random.Random], list[Parcel]]


def shard(corpus: Corpus, spec: ShardingSpec, num_clients: int, seed: int) -> tuple[Corpus, ...]:
    """Deal a corpus out to clients: every byte to exactly one of them, and none goes empty.

    `natural` gives whole groups to one client, largest first, each to the client with the least.
    `iid` shuffles the items and deals them in the same way, so that sizes (or, with a skew, sizes
    divided by what the skew gives) differ by one item at most.

    The others go by label, or by group where there is none. `dirichlet` divides each label among
    all clients by shares drawn from Dirichlet(alpha) (Yurochkin et al. 2019, arXiv 1905.12022;
    Hsu, Qi and Brown 2019, arXiv 1909.06335, draw each client's labels instead); a client that got
    nothing gets the smallest item of the one with the most. `shards` sorts the items by label and
    cuts the line into as many equal shards for each client, `pathological` gives each client so
    many labels, drawn until every label has somebody, and divides each equally among those who
    have it (both after McMahan et al. 2017, arXiv 1602.05629). `partitioner` asks a class of
    flwr-datasets, and leaves out what that leaves out.

    Args:
        corpus: What to deal out.
        spec: How to deal.
        num_clients: Among how many clients.
        seed: Decides the order; the same arguments give the same shards.

    Returns:
        One corpus per client, in the order of the clients.

    Raises:
        DataError: It cannot be dealt so; the text says what is allowed.
    """
    order = random.Random(f"shard/{spec.kind}/{seed}")
    hands = _DEALERS[spec.kind](corpus, spec, num_clients, order)
    return tuple(
        Corpus(name=f"{corpus.name}, client {client}", documents=tuple(hand))
        for client, hand in enumerate(hands)
    )


def shard_held_out(
    corpus: Corpus, spec: ShardingSpec, num_clients: int, seed: int
) -> tuple[Corpus, ...]:
    """Deal the held-out corpus: `natural` as `shard` does where there are groups enough, else iid.

    Every client needs something to evaluate on, and what a client is evaluated on changes no
    weight: the union of all parts is the same held-out corpus either way, and with iid parts of
    equal size the clients' own figures can be compared with each other.

    Raises:
        DataError: There are fewer items than clients.
    """
    by_group = spec.kind == "natural" and len(corpus.groups) >= num_clients
    return shard(corpus, spec if by_group else ShardingSpec(kind="iid"), num_clients, seed)


# --- one dealer per kind ----------------------------------------------------------------------


def _natural(
    corpus: Corpus, spec: ShardingSpec, num_clients: int, order: random.Random
) -> list[Parcel]:
    parcels = list(corpus.groups.values())
    _check(corpus, spec, len(parcels), "groups", num_clients, "sharding=iid")
    order.shuffle(parcels)  # decides between groups of one size
    parcels.sort(key=_size, reverse=True)
    return _to_least_loaded(parcels, [1.0] * num_clients)


def _iid(
    corpus: Corpus, spec: ShardingSpec, num_clients: int, order: random.Random
) -> list[Parcel]:
    parcels = [[item] for item in _items(corpus)]
    _check(corpus, spec, len(parcels), _noun(corpus), num_clients, "more data")
    order.shuffle(parcels)
    return _to_least_loaded(parcels, _shares(num_clients, spec.skew))


def _dirichlet(
    corpus: Corpus, spec: ShardingSpec, num_clients: int, order: random.Random
) -> list[Parcel]:
    labels = _by_label(corpus)
    _check(corpus, spec, sum(map(len, labels.values())), _noun(corpus), num_clients, "more data")
    draw = np.random.default_rng(order.getrandbits(64))
    hands: list[Parcel] = [[] for _ in range(num_clients)]
    for items in labels.values():
        runs = _cut(items, draw.dirichlet([spec.alpha] * num_clients).tolist())
        for hand, run in zip(hands, runs, strict=True):
            hand += run
    _fill_empty(hands)
    return hands


def _pathological(
    corpus: Corpus, spec: ShardingSpec, num_clients: int, order: random.Random
) -> list[Parcel]:
    labels = _by_label(corpus)
    _check_labels(corpus, spec, len(labels), num_clients)
    counts = {label: len(items) for label, items in labels.items()}
    drawn = _draw_labels(corpus, counts, num_clients, spec.classes, order)
    hands: list[Parcel] = [[] for _ in range(num_clients)]
    for label, items in labels.items():
        takers = [hand for hand, names in zip(hands, drawn, strict=True) if label in names]
        for hand, run in zip(takers, _cut(items, [1.0] * len(takers), least=1), strict=True):
            hand += run
    return hands


def _shards(
    corpus: Corpus, spec: ShardingSpec, num_clients: int, order: random.Random
) -> list[Parcel]:
    line = [item for items in _by_label(corpus).values() for item in items]
    instead = "a lower sharding.shards"
    _check(corpus, spec, len(line), _noun(corpus), num_clients, instead, each=spec.shards)
    owners = [client for client in range(num_clients) for _ in range(spec.shards)]
    order.shuffle(owners)
    shares = _shares(num_clients, spec.skew)
    hands: list[Parcel] = [[] for _ in range(num_clients)]
    runs = _cut(line, [shares[owner] for owner in owners], least=1)
    for owner, run in zip(owners, runs, strict=True):
        hands[owner] += run
    return hands


def _partitioner(
    corpus: Corpus, spec: ShardingSpec, num_clients: int, order: random.Random
) -> list[Parcel]:
    seed = order.getrandbits(32)
    return partition(_items(corpus), spec.target, spec.options, num_clients, seed)


_DEALERS: dict[str, Dealer] = {
    "iid": _iid,
    "natural": _natural,
    "dirichlet": _dirichlet,
    "pathological": _pathological,
    "shards": _shards,
    "partitioner": _partitioner,
}


# --- labels -----------------------------------------------------------------------------------


def _by_label(corpus: Corpus) -> dict[str, Parcel]:
    """The items of each label (or group), sorted by label, in the corpus's order."""
    found: dict[str, Parcel] = {}
    for item in _items(corpus):
        found.setdefault(item.label or item.group, []).append(item)
    return dict(sorted(found.items()))


def _draw_labels(
    corpus: Corpus, counts: dict[str, int], num_clients: int, classes: int, order: random.Random
) -> list[list[str]]:
    """So many labels for each client, dealt like cards: a new deck when the last one is gone.

    A deck holds each label once, but not those of which every item has a taker.
    """
    left, deck = Counter(counts), list[str]()
    hands: list[list[str]] = [[] for _ in range(num_clients)]
    for hand in hands:
        while len(hand) < classes:
            if not any(label not in hand for label in deck):
                deck = [label for label in counts if left[label]]
                order.shuffle(deck)
            fresh = [label for label in deck if label not in hand]
            if not fresh:
                raise DataError(
                    f"sharding=pathological: the {sum(counts.values())} {_noun(corpus)} of "
                    f"{corpus.name} are too few for {num_clients} clients with {classes} labels "
                    "each; lower clients or sharding.classes"
                )
            deck.remove(fresh[0])
            left[fresh[0]] -= 1
            hand.append(fresh[0])
    return hands


def _check_labels(corpus: Corpus, spec: ShardingSpec, num_labels: int, num_clients: int) -> None:
    noun = "labels" if _is_labelled(corpus) else "groups"
    if spec.classes > num_labels:
        raise DataError(
            f"sharding.classes={spec.classes}, but {corpus.name} has {num_labels} {noun}; lower it"
        )
    if spec.classes * num_clients < num_labels:
        raise DataError(
            f"sharding=pathological: {num_clients} clients with {spec.classes} {noun} each leave "
            f"some of the {num_labels} {noun} of {corpus.name} to nobody; "
            f"set sharding.classes to {-(-num_labels // num_clients)} or more"
        )


# --- items, and how they are shared out -------------------------------------------------------


def _items(corpus: Corpus) -> Parcel:
    return [
        item
        for document in corpus.documents
        for item in ([document] if document.label else _pieces(document))
    ]


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
    return [replace(document, text=piece) for piece in texts or [text]]


def _is_labelled(corpus: Corpus) -> bool:
    return any(document.label for document in corpus.documents)


def _noun(corpus: Corpus) -> str:
    return "examples" if _is_labelled(corpus) else "paragraphs"


def _size(parcel: Parcel) -> int:
    return sum(1 if item.label else item.num_bytes for item in parcel)


def _check(
    corpus: Corpus,
    spec: ShardingSpec,
    found: int,
    noun: str,
    num_clients: int,
    instead: str,
    each: int = 1,
) -> None:
    if found // each < num_clients:
        raise DataError(
            f"sharding={spec.kind}: {found} {noun} of {corpus.name} allow at most {found // each} "
            f"clients, {num_clients} asked for; lower clients, or use {instead}"
        )


def _shares(num_clients: int, skew: float) -> list[float]:
    return [(client + 1) ** -skew for client in range(num_clients)]


def _cut(items: Parcel, shares: Sequence[float], least: int = 0) -> list[Parcel]:
    """Consecutive runs with sizes as near to `shares` as whole items allow, none under `least`.

    An item goes where its middle falls.
    """
    sizes = np.array([_size([item]) for item in items])
    bounds = np.cumsum(shares) * (sizes.sum() / sum(shares))
    ends = np.searchsorted(np.cumsum(sizes) - sizes / 2, bounds, side="right").tolist()
    runs, start = [], 0
    for number, nearest in enumerate([*ends[:-1], len(items)], start=1):
        end = min(max(nearest, start + least), len(items) - (len(ends) - number) * least)
        runs.append(items[start:end])
        start = end
    return runs


def _to_least_loaded(parcels: list[Parcel], shares: Sequence[float]) -> list[Parcel]:
    """Each parcel in turn to the client with the least for its share (the first of several)."""
    hands: list[Parcel] = [[] for _ in shares]
    loads = [(0.0, client) for client in range(len(shares))]
    for parcel in parcels:
        load, client = loads[0]
        hands[client] += parcel
        heapq.heapreplace(loads, (load + _size(parcel) / shares[client], client))
    return hands


def _fill_empty(hands: list[Parcel]) -> None:
    """Give whoever has nothing the smallest item of the one who has most, but more than one."""
    for hand in hands:
        if not hand:
            giver = max((other for other in hands if len(other) > 1), key=_size)
            item = min(range(len(giver)), key=lambda number: _size([giver[number]]))
            hand.append(giver.pop(item))
