"""A client's machine: which client it is, and its share of the data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

from flwr.app import Context
from transformers import TokenizersBackend

from fedsplit.data import (
    Batch,
    Corpus,
    Examples,
    evaluation_batches,
    examples,
    hold_out,
    load_corpus,
    load_tokenizer,
    shard,
    shard_held_out,
    tokenizer_from_json,
    training_batches,
)
from fedsplit.errors import ConfigError
from fedsplit.spec import RunSpec


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

    def snapshots_of(self, run: RunSpec) -> Path:
        """Where this client keeps its snapshots of a run."""
        shared = Path(run.launch.run_dir) / run.name / "clients"
        return (Path(self.state_dir) / run.name if self.state_dir else shared) / self.name


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


@lru_cache(maxsize=64)
def texts_of(run: RunSpec, node: Node) -> tuple[tuple[Corpus, ...], tuple[Corpus, ...]]:
    """A node's documents to train on and its held-out ones; read once, for all rounds."""
    if node.data_path:
        kind = "text" if run.data.kind == "embedded" else run.data.kind
        own = load_corpus(replace(run.data, kind=kind, path=node.data_path), run.task)
        training, held_out = hold_out(own, run.data.held_out, run.seed)
        return (training,), (held_out,)
    whole, rest = hold_out(load_corpus(run.data, run.task), run.data.held_out, run.seed)
    dealt = shard(whole, run.sharding, run.clients, run.seed)
    dealt_rest = shard_held_out(rest, run.sharding, run.clients, run.seed)
    if run.baseline == "central":
        return dealt, dealt_rest
    return (dealt[node.partition],), (dealt_rest[node.partition],)


@lru_cache(maxsize=64)
def share_of(run: RunSpec, node: Node, preparation: Preparation) -> Share:
    """A node's data as examples; made once, for all rounds."""
    training, held_out = texts_of(run, node)
    tokenizer = tokenizer_of(run, preparation)

    def made(corpora: tuple[Corpus, ...]) -> tuple[Examples, ...]:
        return tuple(examples(c, run.data, tokenizer, preparation.labels) for c in corpora)

    return Share(run=run, training=made(training), held_out=made(held_out))


@lru_cache(maxsize=4)
def tokenizer_of(run: RunSpec, preparation: Preparation) -> TokenizersBackend | None:
    """The run's tokenizer; none for images."""
    if run.task == "image_classification":
        return None
    if run.model.pretrained:
        return load_tokenizer(run.model.pretrained, run.model.revision)
    return tokenizer_from_json(preparation.tokenizer)
