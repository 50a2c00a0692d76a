"""A client's machine: which client it is, and its share of the data."""

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

from flwr.app import Context
from transformers import TokenizersBackend

from fedsplit import atomic
from fedsplit.data import (
    TASKS,
    Batch,
    Corpus,
    Examples,
    evaluation_batches,
    hold_out,
    load_corpus,
    load_tokenizer,
    shard,
    shard_held_out,
    tokenizer_from_json,
    training_batches,
)
from fedsplit.errors import ConfigError
from fedsplit.runs.folder import is_run_id
from fedsplit.spec import DataSpec, RunSpec, ShardingSpec

log = logging.getLogger("flwr.fedsplit")

KEPT_RUNS = 3
"""How many runs of one name a client keeps checkpoints of, however old they are."""
ACTIVE_S = 7 * 86_400.0
"""Seconds for which the checkpoints of a run are kept, however many newer runs there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What this machine alone knows, from Flower's `--node-config`.

    `partition` of `partitions` is its share of a corpus that all clients have; with a `data_path`
    all text there is its own. `device` is torch's name, `tls_ca` a file of trusted roots, and
    `state_dir` the folder where it keeps what a resumed run goes on from.
    """

    partition: int
    partitions: int
    data_path: str
    device: str
    tls_ca: str
    state_dir: str

    @staticmethod
    def of(context: Context, run: RunSpec) -> "Node":
        """Read the node's config.

        Raises:
            ConfigError: The node does not know which client of the run it is.
        """
        told = context.node_config
        node = Node(
            partition=int(told.get("partition-id", -1)),
            partitions=int(told.get("num-partitions", run.num_nodes)),
            data_path=str(told.get("data-path", "")),
            device=str(told.get("device", run.launch.client_device)),
            tls_ca=str(told.get("tls-ca", run.wire.tls_ca)),
            state_dir=str(told.get("state-dir", "")),
        )
        if not 0 <= node.partition < run.num_nodes or node.partitions != run.num_nodes:
            raise ConfigError(
                f"this node is partition {node.partition} of {node.partitions}, but the run has "
                f"clients={run.num_nodes}; start it with --node-config 'partition-id=I "
                f"num-partitions={run.num_nodes}', or a simulation with --federation-config "
                f"'num-supernodes={run.num_nodes}'"
            )
        return node

    @property
    def name(self) -> str:
        """The client's name in the run; the same in every run of the same partition."""
        return f"client-{self.partition}"

    def checkpoints_of(self, run: RunSpec, run_id: str) -> Path:
        """Where this client keeps its checkpoints of a run; beside those of other runs of its name.

        Raises:
            ConfigError: The server sent an id that is none.
        """
        if not is_run_id(run_id):
            raise ConfigError(
                f"the server sent the run id {run_id!r}, but an id is 16 hex digits; start both "
                "sides from the same code"
            )
        shared = Path(run.launch.run_dir) / run.name / "clients"
        parent = Path(self.state_dir) / run.name if self.state_dir else shared
        return parent / self.name / run_id


def remove_old_runs(parent: Path, now: float) -> None:
    """Bound the checkpoints of one client and one name, whose folders are named by run ids.

    The `KEPT_RUNS` runs that were active last are kept, and every run that was active within
    `ACTIVE_S` seconds before `now`, as another run may be using or may resume them.

    Args:
        parent: The folder of the client.
        now: Seconds since the epoch.
    """
    atomic.recover(parent)
    active = {p: p.stat().st_mtime for p in parent.glob("*") if is_run_id(p.name)}
    for path in sorted(active, key=active.__getitem__, reverse=True)[KEPT_RUNS:]:
        if (days := (now - active[path]) / 86_400) * 86_400 > ACTIVE_S:
            log.warning(
                "Remove %s: the run was last active %.0f days ago, and %d newer runs of its name "
                "are kept",
                path,
                days,
                KEPT_RUNS,
            )
            atomic.remove(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """What turns documents into tensors, the same at every client.

    `tokenizer` is one as JSON, empty for a checkpoint, which has its own.
    """

    tokenizer: str
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Share:
    """A client's examples: to train on, and held out. Who has all clients' data has all of each."""

    run: RunSpec
    training: tuple[Examples, ...]
    held_out: tuple[Examples, ...]

    def __len__(self) -> int:
        """How many examples there are to train on."""
        return sum(map(len, self.training))

    def groups(self, start: int, num_steps: int) -> Iterator[Sequence[Batch]]:
        """The batches of each of the next optimizer steps, from batch `start` on."""
        train = self.run.train
        streams = [
            training_batches(
                own,
                batch_size=train.batch_size,
                num_batches=num_steps * train.accumulation,
                seed=self.run.seed,
                start=start,
            )
            for own in self.training
        ]
        for _ in range(num_steps):
            yield [batch for stream in streams for batch in islice(stream, train.accumulation)]

    def evaluation(self) -> Iterator[Batch]:
        """All held-out batches."""
        size = self.run.train.batch_size
        return chain.from_iterable(evaluation_batches(own, size) for own in self.held_out)


def texts_of(run: RunSpec, node: Node) -> tuple[tuple[Corpus, ...], tuple[Corpus, ...]]:
    """A node's documents to train on and its held-out ones; read once, for all rounds."""
    with _making:
        if node.data_path:
            kind = "text" if run.data.kind == "embedded" else run.data.kind
            own = replace(run.data, kind=kind, path=node.data_path)
            training, held_out = own_corpora(own, run.task, run.seed)
            return (training,), (held_out,)
        dealt, dealt_rest = partitions_of(run.data, run.task, run.sharding, run.clients, run.seed)
    if run.baseline == "central":
        return dealt, dealt_rest
    return (dealt[node.partition],), (dealt_rest[node.partition],)


def share_of(run: RunSpec, node: Node, preparation: Preparation) -> Share:
    """A node's data as examples; made once, for all rounds."""
    prepared = _prepared_of(run, preparation)
    if node not in prepared.shares:
        training, held_out = (
            tuple(
                TASKS[run.task].examples(c, run.data, prepared.tokenizer, preparation.labels)
                for c in corpora
            )
            for corpora in texts_of(run, node)
        )
        prepared.shares[node] = Share(run=run, training=training, held_out=held_out)
    return prepared.shares[node]


def tokenizer_of(run: RunSpec, preparation: Preparation) -> TokenizersBackend | None:
    """The run's tokenizer; none for images."""
    return _prepared_of(run, preparation).tokenizer


# --- kept from message to message -------------------------------------------------------------
#
# One run at a time: a process that simulates all clients keeps one corpus and its examples, however
# many clients there are, and nothing of the run before.

_making = threading.Lock()
"""Held while a cache is asked: clients that begin at once must not all make the same."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Prepared:
    """The tokenizer of a run, and the examples of the nodes in this process."""

    tokenizer: TokenizersBackend | None
    shares: dict[Node, Share]


@lru_cache(maxsize=1)
def partitions_of(
    data: DataSpec, task: str, sharding: ShardingSpec, clients: int, seed: int
) -> tuple[tuple[Corpus, ...], tuple[Corpus, ...]]:
    """The shards of all clients to train on, and those that are held out."""
    whole, rest = hold_out(load_corpus(data, task), data.held_out, seed)
    held_out = shard_held_out(rest, sharding, clients, seed)
    return shard(whole, sharding, clients, seed), held_out


@lru_cache(maxsize=1)
def own_corpora(data: DataSpec, task: str, seed: int) -> tuple[Corpus, Corpus]:
    """A client's own corpus: what to train on, and what is held out."""
    return hold_out(load_corpus(data, task), data.held_out, seed)


def _prepared_of(run: RunSpec, preparation: Preparation) -> _Prepared:
    with _making:
        return _prepare(run, preparation)


@lru_cache(maxsize=1)
def _prepare(run: RunSpec, preparation: Preparation) -> _Prepared:
    if not TASKS[run.task].reads_text:
        return _Prepared(tokenizer=None, shares={})
    if run.model.pretrained:
        tokenizer = load_tokenizer(run.model.pretrained, run.model.revision)
    else:
        tokenizer = tokenizer_from_json(preparation.tokenizer)
    return _Prepared(tokenizer=tokenizer, shares={})
