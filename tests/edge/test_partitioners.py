"""Our dealings agree with flwr-datasets' partitioners, and those can deal for us."""

import sys
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from fedsplit.data import Corpus, Document, shard
from fedsplit.errors import DataError
from fedsplit.spec import ShardingSpec

pytest.importorskip("flwr_datasets", reason="the extra `partitioners` is not installed")

from datasets import Dataset
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    GroupedNaturalIdPartitioner,
    IidPartitioner,
    LinearPartitioner,
    Partitioner,
    PathologicalPartitioner,
    ShardPartitioner,
    SizePartitioner,
)

LABELS = [str(number) for number in range(10)]
EACH = 60
CLIENTS = 10
SEEDS = range(24)
MODULE = "flwr_datasets.partitioner"

# pyarrow says it of how datasets calls it
pytestmark = pytest.mark.filterwarnings("ignore:Specifying null_placement:FutureWarning")


def corpus_of(labels: list[str]) -> Corpus:
    documents = [
        Document(text=f"text {n}", group=f"row {n}", label=k) for n, k in enumerate(labels)
    ]
    return Corpus(name="sample", documents=tuple(documents))


def shuffled(seed: int) -> list[str]:
    return np.random.default_rng(seed).permutation(np.repeat(LABELS, EACH)).tolist()


def ours(spec: ShardingSpec, labels: list[str], num_clients: int, seed: int) -> list[list[int]]:
    """The numbers of each client's examples."""
    parts = shard(corpus_of(labels), spec, num_clients, seed)
    return [[int(d.group.removeprefix("row ")) for d in part.documents] for part in parts]


def theirs(partitioner: Partitioner, labels: list[str]) -> list[list[int]]:
    rows = range(len(labels))
    partitioner.dataset = Dataset.from_dict({"row": list(rows), "label": labels})
    return [
        partitioner.load_partition(number)["row"][:] for number in range(partitioner.num_partitions)
    ]


def counted(parts: list[list[int]], labels: list[str]) -> np.ndarray:
    """How many examples of each label (second axis) each client (first axis) has."""
    return np.array([np.bincount([int(labels[n]) for n in part], minlength=10) for part in parts])


def distance(counts: np.ndarray) -> float:
    """Mean total variation distance between a client's labels and those of all."""
    shares = counts / counts.sum(axis=1, keepdims=True)
    return float(np.abs(shares - counts.sum(axis=0) / counts.sum()).sum(axis=1).mean() / 2)


def entropy(counts: np.ndarray) -> float:
    """Mean entropy of a client's labels, in nats."""
    shares = counts / counts.sum(axis=1, keepdims=True)
    return float(-(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=1).mean())


def statistics(samples: Sequence[np.ndarray]) -> np.ndarray:
    """Over samples the means of: distinct labels, entropy, distance, and spread of sizes."""
    return np.mean(
        [
            [(c > 0).sum(axis=1).mean(), entropy(c), distance(c), c.sum(axis=1).std() / EACH]
            for c in samples
        ],
        axis=0,
    )


def agree(spec: ShardingSpec, make: Callable[[int], Partitioner]) -> None:
    """The means over seeds are the same, as far as so many seeds can tell."""
    mine, other = [], []
    for seed in SEEDS:
        labels = shuffled(seed)
        mine.append(counted(ours(spec, labels, CLIENTS, seed), labels))
        other.append(counted(theirs(make(seed), labels), labels))
    assert statistics(mine) == pytest.approx(statistics(other), rel=0.2, abs=0.02)


# --- agreement --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_examples", [30, 31, 39], ids=str)
def test_iid_sizes_are_those_of_their_iid(num_examples):
    labels = shuffled(0)[:num_examples]
    mine = ours(ShardingSpec(kind="iid"), labels, 4, seed=0)
    assert [*map(len, mine)] == [*map(len, theirs(IidPartitioner(4), labels))]


def test_iid_labels_are_as_alike_as_theirs():
    agree(ShardingSpec(kind="iid"), lambda seed: IidPartitioner(CLIENTS))


@pytest.mark.filterwarnings("ignore:The specified min_partition_size")  # then it draws again
@pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0], ids=str)
def test_dirichlet_labels_and_sizes_are_distributed_as_theirs(alpha):
    agree(
        ShardingSpec(kind="dirichlet", alpha=alpha),
        lambda seed: DirichletPartitioner(CLIENTS, "label", alpha, min_partition_size=1, seed=seed),
    )


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 10], ids=str)
def test_pathological_clients_have_as_much_of_as_many_labels_as_theirs(classes):
    labels = shuffled(0)
    mine = ours(ShardingSpec(kind="pathological", classes=classes), labels, CLIENTS, seed=0)
    other = theirs(PathologicalPartitioner(CLIENTS, "label", classes, "deterministic"), labels)
    assert np.array_equal(*(np.sort(counted(parts, labels)) for parts in (mine, other)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_clients", [10, 20, 30], ids=str)
def test_pathological_of_one_label_is_theirs_but_for_who_has_which(num_clients, seed):
    labels = shuffled(seed)
    mine = ours(ShardingSpec(kind="pathological", classes=1), labels, num_clients, seed)
    partitioner = PathologicalPartitioner(num_clients, "label", 1, "deterministic")
    assert {frozenset(p) for p in mine} == {frozenset(p) for p in theirs(partitioner, labels)}


def test_pathological_of_all_labels_is_theirs():
    labels = shuffled(0)
    mine = ours(ShardingSpec(kind="pathological", classes=10), labels, CLIENTS, seed=0)
    other = theirs(PathologicalPartitioner(CLIENTS, "label", 10), labels)
    assert [*map(sorted, mine)] == [*map(sorted, other)]


@pytest.mark.parametrize("num_shards", [1, 2], ids=str)
def test_shards_are_distributed_as_theirs(num_shards):
    agree(
        ShardingSpec(kind="shards", shards=num_shards),
        lambda seed: ShardPartitioner(CLIENTS, "label", num_shards, seed=seed),
    )


# --- sharding=partitioner ---------------------------------------------------------------------


def by(name: str, **options: object) -> ShardingSpec:
    return ShardingSpec(kind="partitioner", target=f"{MODULE}.{name}", options=options)


SAME = {
    "LinearPartitioner": (by("LinearPartitioner"), LinearPartitioner(4)),
    "SizePartitioner": (
        by("SizePartitioner", partition_sizes=[9, 1, 580, 10]),
        SizePartitioner([9, 1, 580, 10]),
    ),
    "DirichletPartitioner": (
        by("DirichletPartitioner", alpha=0.5, seed=3),
        DirichletPartitioner(4, "label", 0.5, seed=3),
    ),
    "GroupedNaturalIdPartitioner": (
        by("GroupedNaturalIdPartitioner", group_size=3),
        GroupedNaturalIdPartitioner("label", 3),
    ),
}


@pytest.mark.parametrize(("spec", "partitioner"), SAME.values(), ids=SAME)
def test_a_partitioner_deals_for_us_as_for_itself(spec, partitioner):
    labels = shuffled(0)
    assert ours(spec, labels, 4, seed=0) == theirs(partitioner, labels)


def test_a_partitioner_draws_by_the_seed_of_the_run():
    spec, labels = by("DirichletPartitioner", alpha=0.5), shuffled(0)
    assert ours(spec, labels, 4, seed=1) == ours(spec, labels, 4, seed=1)
    assert ours(spec, labels, 4, seed=1) != ours(spec, labels, 4, seed=2)


def test_a_partitioner_goes_by_groups_and_sees_pieces_where_there_are_no_labels():
    text = "A sentence of some length, and a little more. " * 5 + "\n\n"
    documents = tuple(Document(text=text * 3, group=group) for group in "aabb")
    spec = by("NaturalIdPartitioner")
    parts = shard(Corpus(name="sample", documents=documents), spec, 2, seed=0)
    assert [len(part.documents) for part in parts] == [6, 6]
    assert [set(part.groups) for part in parts] == [{"a"}, {"b"}]


def test_what_a_partitioner_leaves_out_is_nobodys():
    parts = ours(by("SizePartitioner", partition_sizes=[5, 5]), shuffled(0)[:10], 2, seed=0)
    assert [len(part) for part in parts] == [5, 5]
    spec = by("ShardPartitioner", num_shards_per_partition=3)
    assert sum(map(len, ours(spec, shuffled(0)[:20], 2, seed=0))) == 18


class Twice(Partitioner):
    """Gives everything to everybody."""

    num_partitions = 2

    def load_partition(self, partition_id: int) -> Dataset:
        return self.dataset


class Nothing(Twice):
    """Gives nothing to the second."""

    def load_partition(self, partition_id: int) -> Dataset:
        return self.dataset.select(range(10 * (1 - partition_id)))


def own(made: type) -> ShardingSpec:
    return ShardingSpec(kind="partitioner", target=f"{made.__module__}:{made.__qualname__}")


REFUSED = {
    "not there": (by("Nope"), "Nope cannot be imported .*pip install 'fedsplit\\[partitioners\\]'"),
    "no such library": (
        ShardingSpec(kind="partitioner", target="no_such_library.Partitioner"),
        "No module named 'no_such_library'",
    ),
    "no class": (
        ShardingSpec(kind="partitioner", target="math.pi"),
        "sharding.target=math.pi is 3.14.*; name a subclass of flwr_datasets.partitioner.Part",
    ),
    "no partitioner": (
        ShardingSpec(kind="partitioner", target="fractions.Fraction"),
        "sharding.target=fractions.Fraction is <class .*; name a subclass of flwr_datasets",
    ),
    "options that it does not take": (
        by("IidPartitioner", alpha=1),
        "IidPartitioner with {'num_partitions': 2, 'alpha': 1} cannot partition .* 'alpha'",
    ),
    "options that it needs": (by("SizePartitioner"), "'partition_sizes'; change sharding.options"),
    "a column that is not there": (
        by("NaturalIdPartitioner", partition_by="author"),
        "columns item, label, group, num_bytes: .*author",
    ),
    "another number of partitions": (
        by("NaturalIdPartitioner", partition_by="group"),
        "it makes 10 partitions, but there are 2 clients",
    ),
    "another number on purpose": (by("IidPartitioner", num_partitions=3), "makes 3 partitions"),
    "an item for two": (own(Twice), "Twice assigns an item to two clients"),
    "nothing for one": (own(Nothing), "Nothing makes an empty partition for client 1 of 2; lower"),
}


@pytest.mark.parametrize(("spec", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_dealt_is_refused(spec, message):
    with pytest.raises(DataError, match=message):
        ours(spec, shuffled(0)[:10], 2, seed=0)


@pytest.mark.parametrize("library", ["datasets", "flwr_datasets"])
def test_a_library_that_is_not_installed_is_told_with_the_command(library, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        DataError, match=rf"{library}.*needs: pip install 'fedsplit\[partitioners\]'"
    ):
        ours(by("IidPartitioner"), shuffled(0)[:10], 2, seed=0)
