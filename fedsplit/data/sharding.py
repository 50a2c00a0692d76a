"""Sharding: the partition of a corpus among the clients.

A table has one partitioner for each kind. Partitioners divide items: a document with a label is
one item, as is a conversation, and a text without a label is cut into items of a paragraph or
more. The size of a labelled item is 1, and the size of another one is its number of bytes.
"""

import heapq
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from fedsplit.data.corpora import Corpus, Document, paragraph_runs
from fedsplit.data.partitioners import load_partitions
from fedsplit.errors import DataError
from fedsplit.spec import ShardingSpec

# A heading alone is no sample, so a piece of text has at least this many characters.
PIECE_CHARS = 200

Items = list[Document]
Partitioner = Callable[[Corpus, ShardingSpec, int, random.Random], list[Items]]


def shard(corpus: Corpus, spec: ShardingSpec, num_clients: int, seed: int) -> tuple[Corpus, ...]:
    """Partition a corpus among clients; every partition has an item, and no item is in two.

    `natural` assigns whole groups, the largest first, each to the client with the smallest
    partition. `iid` shuffles the items and assigns them in the same way, so that sizes (or, with
    a skew, sizes divided by the clients' shares) differ by at most one item.

    The other kinds partition by label, or by group if documents have no label. `dirichlet` divides
    each label among all clients by shares drawn from Dirichlet(alpha) (Yurochkin et al. 2019,
    arXiv 1905.12022; Hsu, Qi and Brown 2019, arXiv 1909.06335, draw each client's labels instead);
    an empty partition gets the smallest item of the largest partition. `shards` sorts the items by
    label and cuts them into runs of equal size, of which each client gets `shards` runs.
    `pathological` draws `classes` labels for each client, so that every label is drawn, and
    divides each label equally among its clients (both after McMahan et al. 2017,
    arXiv 1602.05629). `partitioner` calls a partitioner of flwr-datasets, which may leave items
    out; no other kind does.

    Args:
        corpus: The corpus to partition.
        spec: The kind of partition and its parameters.
        num_clients: Number of partitions.
        seed: Decides the order; the same arguments give the same partitions.

    Returns:
        One corpus per client, in the order of the clients.

    Raises:
        DataError: The corpus does not allow this partition; the text has the limit.
    """
    # The prefix makes this stream independent of the others of the same seed.
    order = random.Random(f"shard/{spec.kind}/{seed}")
    partitions = _PARTITIONERS[spec.kind](corpus, spec, num_clients, order)
    return tuple(
        Corpus(name=f"{corpus.name}, client {client}", documents=tuple(items))
        for client, items in enumerate(partitions)
    )


def shard_held_out(
    corpus: Corpus, spec: ShardingSpec, num_clients: int, seed: int
) -> tuple[Corpus, ...]:
    """Partition the held-out corpus: by group for `natural` if there are enough groups, else iid.

    Every client needs held-out data, and held-out data changes no weight. The union of the
    partitions is the whole held-out corpus in both cases, and with iid partitions of equal size
    the results of clients can be compared with each other.

    Raises:
        DataError: There are fewer items than clients.
    """
    by_group = spec.kind == "natural" and len(corpus.groups) >= num_clients
    return shard(corpus, spec if by_group else ShardingSpec(kind="iid"), num_clients, seed)


# --- one partitioner per kind -----------------------------------------------------------------


def _natural(
    corpus: Corpus, spec: ShardingSpec, num_clients: int, order: random.Random
) -> list[Items]:
    groups = list(corpus.groups.values())
    _check(corpus, spec, len(groups), "groups", num_clients, "sharding=iid")
    # Sorting is stable, so the shuffle decides between groups of one size.
    order.shuffle(groups)
    groups.sort(key=_size, reverse=True)
    return _to_least_loaded(groups, [1.0] * num_clients)


def _iid(corpus: Corpus, spec: ShardingSpec, num_clients: int, order: random.Random) -> list[Items]:
    single_items = [[item] for item in _items(corpus)]
    _check(corpus, spec, len(single_items), _noun(corpus), num_clients, "more data")
    order.shuffle(single_items)
    return _to_least_loaded(single_items, _shares(num_clients, spec.skew))


def _dirichlet(
    corpus: Corpus, spec: ShardingSpec, num_clients: int, order: random.Random
) -> list[Items]:
    labels = _by_label(corpus)
    _check(corpus, spec, sum(map(len, labels.values())), _noun(corpus), num_clients, "more data")
    draw = np.random.default_rng(order.getrandbits(64))
    partitions: list[Items] = [[] for _ in range(num_clients)]
    for items in labels.values():
        runs = _cut(items, draw.dirichlet([spec.alpha] * num_clients).tolist())
        for partition, run in zip(partitions, runs, strict=True):
            partition += run
    _fill_empty(partitions)
    return partitions


def _pathological(
    corpus: Corpus, spec: ShardingSpec, num_clients: int, order: random.Random
) -> list[Items]:
    labels = _by_label(corpus)
    _check_labels(corpus, spec, len(labels), num_clients)
    counts = {label: len(items) for label, items in labels.items()}
    drawn = _draw_labels(corpus, counts, num_clients, spec.classes, order)
    partitions: list[Items] = [[] for _ in range(num_clients)]
    for label, items in labels.items():
        sharing = [part for part, names in zip(partitions, drawn, strict=True) if label in names]
        runs = _cut(items, [1.0] * len(sharing), least=1)
        for partition, run in zip(sharing, runs, strict=True):
            partition += run
    return partitions


def _shards(
    corpus: Corpus, spec: ShardingSpec, num_clients: int, order: random.Random
) -> list[Items]:
    by_label = [item for items in _by_label(corpus).values() for item in items]
    instead = "a lower sharding.shards"
    _check(corpus, spec, len(by_label), _noun(corpus), num_clients, instead, each=spec.shards)
    owners = [client for client in range(num_clients) for _ in range(spec.shards)]
    order.shuffle(owners)
    shares = _shares(num_clients, spec.skew)
    partitions: list[Items] = [[] for _ in range(num_clients)]
    runs = _cut(by_label, [shares[owner] for owner in owners], least=1)
    for owner, run in zip(owners, runs, strict=True):
        partitions[owner] += run
    return partitions


def _partitioner(
    corpus: Corpus, spec: ShardingSpec, num_clients: int, order: random.Random
) -> list[Items]:
    items, seed = _items(corpus), order.getrandbits(32)
    _check(corpus, spec, len(items), _noun(corpus), num_clients, "more data")
    return load_partitions(items, spec.target, spec.options, num_clients, seed)


_PARTITIONERS: dict[str, Partitioner] = {
    "iid": _iid,
    "natural": _natural,
    "dirichlet": _dirichlet,
    "pathological": _pathological,
    "shards": _shards,
    "partitioner": _partitioner,
}


# --- labels -----------------------------------------------------------------------------------


def _by_label(corpus: Corpus) -> dict[str, Items]:
    """The items of each label (or group), sorted by label, in the corpus's order."""
    by_label: dict[str, Items] = {}
    for item in _items(corpus):
        by_label.setdefault(item.label or item.group, []).append(item)
    return dict(sorted(by_label.items()))


def _draw_labels(
    corpus: Corpus, counts: dict[str, int], num_clients: int, classes: int, order: random.Random
) -> list[list[str]]:
    """Draw `classes` labels for each client without replacement, from one pool after another.

    A pool has each label once, except labels that are already drawn as often as they have items.
    """
    left, pool = Counter(counts), list[str]()
    drawn: list[list[str]] = []
    for _ in range(num_clients):
        labels: list[str] = []
        while len(labels) < classes:
            if not any(label not in labels for label in pool):
                pool = [label for label in counts if left[label]]
                order.shuffle(pool)
            fresh = [label for label in pool if label not in labels]
            if not fresh:
                raise DataError(
                    f"sharding=pathological: the {sum(counts.values())} {_noun(corpus)} of "
                    f"{corpus.name} are too few for {num_clients} clients with {classes} labels "
                    "each; lower clients or sharding.classes"
                )
            pool.remove(fresh[0])
            left[fresh[0]] -= 1
            labels.append(fresh[0])
        drawn.append(labels)
    return drawn


def _check_labels(corpus: Corpus, spec: ShardingSpec, num_labels: int, num_clients: int) -> None:
    noun = "labels" if _is_labelled(corpus) else "groups"
    if spec.classes > num_labels:
        raise DataError(
            f"sharding.classes={spec.classes}, but {corpus.name} has {num_labels} {noun}; lower it"
        )
    if spec.classes * num_clients < num_labels:
        raise DataError(
            f"sharding=pathological: {num_clients} clients with {spec.classes} {noun} each leave "
            f"some of the {num_labels} {noun} of {corpus.name} to no client; "
            f"set sharding.classes to {-(-num_labels // num_clients)} or more"
        )


# --- items, and their assignment to clients ---------------------------------------------------


def _items(corpus: Corpus) -> Items:
    return [
        item
        for document in corpus.documents
        # A part of a conversation is not a conversation.
        for item in ([document] if document.label or document.messages else _pieces(document))
    ]


def _pieces(document: Document) -> list[Document]:
    """Cut a document after blank lines; the concatenated pieces are the document."""
    texts, rest = paragraph_runs(document.text, PIECE_CHARS)
    # A rest that is too short for a piece belongs to the last one.
    if texts:
        texts[-1] += rest
    return [replace(document, text=piece) for piece in texts or [rest]]


def _is_labelled(corpus: Corpus) -> bool:
    return any(document.label for document in corpus.documents)


def _noun(corpus: Corpus) -> str:
    return "examples" if _is_labelled(corpus) else "paragraphs"


def _size(items: Items) -> int:
    return sum(1 if item.label else item.num_bytes for item in items)


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


def _cut(items: Items, shares: Sequence[float], least: int = 0) -> list[Items]:
    """Cut items into consecutive runs with sizes in proportion to `shares`, up to whole items.

    An item belongs to the run in which its middle lies. Every run has at least `least` items.
    """
    sizes = np.array([_size([item]) for item in items])
    bounds = np.cumsum(shares) * (sizes.sum() / sum(shares))
    ends = np.searchsorted(np.cumsum(sizes) - sizes / 2, bounds, side="right").tolist()
    runs, start = [], 0
    # The last end is exact, since the rounding of the last bound could leave an item out.
    for number, nearest in enumerate([*ends[:-1], len(items)], start=1):
        # Each later run needs `least` items too.
        end = min(max(nearest, start + least), len(items) - (len(ends) - number) * least)
        runs.append(items[start:end])
        start = end
    return runs


def _to_least_loaded(groups: list[Items], shares: Sequence[float]) -> list[Items]:
    """Assign each group in turn to the client with the smallest size for its share.

    Of several such clients, the first one gets it.
    """
    partitions: list[Items] = [[] for _ in shares]
    loads = [(0.0, client) for client in range(len(shares))]
    for group in groups:
        load, client = loads[0]
        partitions[client] += group
        heapq.heapreplace(loads, (load + _size(group) / shares[client], client))
    return partitions


def _fill_empty(partitions: list[Items]) -> None:
    """Move to each empty partition the smallest item of the largest one with several items."""
    for partition in partitions:
        if not partition:
            largest = max((other for other in partitions if len(other) > 1), key=_size)
            smallest = min(range(len(largest)), key=lambda number: _size([largest[number]]))
            partition.append(largest.pop(smallest))
