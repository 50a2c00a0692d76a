"""Flower's client: for one message it builds its half, trains or evaluates, and lets all go.

What lasts from message to message (optimizer moments, how far the data was read) is in
`context.state`, because a deployed ClientApp is a new process for every message.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from transformers import TokenizersBackend

from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.config import from_run_config
from fedsplit.console import quiet_libraries
from fedsplit.data import (
    Batch,
    Corpus,
    Sequences,
    evaluation_batches,
    hold_out,
    load_corpus,
    load_tokenizer,
    shard,
    shard_held_out,
    tokenize,
    tokenizer_from_json,
    training_batches,
)
from fedsplit.errors import ConfigError, ModelMismatch
from fedsplit.flower.records import (
    ARRAYS,
    METRICS,
    WEIGHT,
    Memory,
    Ticket,
    load_arrays,
    to_arrays,
)
from fedsplit.metrics import bits_per_byte
from fedsplit.model import connect
from fedsplit.model.describe import client_of, config_of
from fedsplit.model.lora import trainable
from fedsplit.spec import DataSpec, RunSpec, ShardingSpec
from fedsplit.transport.client import GrpcLink

Numbers = dict[str, int | float | list[int] | list[float]]
"""What Flower takes for the numbers of a reply."""

app = ClientApp()


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What this machine alone knows, from Flower's `--node-config`.

    `partition` of `partitions` is its share of a corpus that all clients have; with a `data_path`
    all text there is its own. `device` is torch's name, `tls_ca` a file of trusted roots.
    """

    partition: int
    partitions: int
    data_path: str
    device: str
    tls_ca: str

    @staticmethod
    def of(context: Context, run: RunSpec) -> "Node":
        """Read the node's config.

        Raises:
            ConfigError: The node does not know which client of the run it is.
        """
        told = context.node_config
        node = Node(
            partition=int(told.get("partition-id", -1)),
            partitions=int(told.get("num-partitions", run.clients)),
            data_path=str(told.get("data-path", "")),
            device=str(told.get("device", "cpu")),
            tls_ca=str(told.get("tls-ca", run.wire.tls_ca)),
        )
        if not 0 <= node.partition < run.clients or node.partitions != run.clients:
            raise ConfigError(
                f"this node is partition {node.partition} of {node.partitions}, but the run has "
                f"clients={run.clients}; start it with --node-config 'partition-id=I "
                f"num-partitions={run.clients}', or a simulation with --federation-config "
                f"'num-supernodes={run.clients}'"
            )
        return node

    @property
    def name(self) -> str:
        """The client's name in the run; the same in every run of the same partition."""
        return f"client-{self.partition}"


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say who this is and how it is configured, before any work is done."""
    run = from_run_config(context.run_config)
    node = Node.of(context, run)
    _texts(run.data, run.sharding, run.seed, node)  # better now than in the middle of a round
    told = ConfigRecord({"client": node.name, "config": run.fingerprint})
    return Message(RecordDict({"hello": told}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the halves together with the trunk for a round."""
    begin = time.monotonic()
    with _half(message, context) as half:
        memory = Memory.of(context.state)
        trainer = ClientTrainer(half.model, half.trunk, half.run, step=memory.steps)
        trainer.optimizer.load_state(memory.moments)
        stats = trainer.fit(half.groups(memory.batches), round=half.ticket.round)
    read = memory.batches + half.run.train.local_steps * half.run.train.accumulation
    moments = trainer.optimizer.state()
    Memory(steps=trainer.steps, batches=read, moments=moments).put_into(context.state)
    numbers: Numbers = {
        WEIGHT: stats.num_tokens,
        "loss": stats.loss,
        "steps": stats.steps,
        "repeated": stats.repeated,
        "skipped": stats.skipped,
        "seconds": time.monotonic() - begin,
        **half.traffic,
    }
    content = RecordDict({METRICS: MetricRecord(numbers)})
    content[ARRAYS] = to_arrays(trainable(half.model))
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the loss on this client's held-out text."""
    with _half(message, context) as half:
        trainer = ClientTrainer(half.model, half.trunk, half.run)
        batches = evaluation_batches(half.held_out, half.run.train.batch_size)
        stats = trainer.evaluate(batches, round=half.ticket.round)
    numbers: Numbers = {
        WEIGHT: stats.num_tokens,
        "loss": stats.nats / max(1, stats.num_tokens),
        "bits-per-byte": bits_per_byte(stats.nats, stats.num_bytes),
        "nats": stats.nats,
        "bytes": stats.num_bytes,
        **half.traffic,
    }
    return Message(RecordDict({METRICS: MetricRecord(numbers)}), reply_to=message)


class _Half:
    """A client for the time of one message: its model, its data, its way to the trunk."""

    def __init__(self, message: Message, context: Context, run: RunSpec, link: GrpcLink) -> None:
        self.run = run
        self.ticket = Ticket.of(message.content)
        self._link = link
        named_tokenizer = (run.model.pretrained, run.model.revision, self.ticket.tokenizer)
        tokenizer = _tokenizer(*named_tokenizer)
        node = Node.of(context, run)
        self.model = client_of(run, config_of(run.model, tokenizer))
        nn.Module.to(self.model, node.device)
        load_arrays(trainable(self.model), message.content.array_records[ARRAYS])
        self.trunk = RemoteTrunk(link, self.model, run, client=self.ticket.client)
        connect(self.model, self.trunk)
        self._training, self.held_out = _sequences(
            run.data, run.sharding, run.seed, node, named_tokenizer
        )

    def groups(self, start: int) -> Iterator[Sequence[Batch]]:
        """The batches of each optimizer step of this round, from batch `start` on."""
        train = self.run.train
        batches = training_batches(
            self._training,
            batch_size=train.batch_size,
            num_batches=train.local_steps * train.accumulation,
            seed=self.run.seed,
            start=start,
        )
        for _ in range(train.local_steps):
            yield list(islice(batches, train.accumulation))

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes that crossed the stream."""
        return {"bytes-up": self._link.bytes_up, "bytes-down": self._link.bytes_down}


@contextmanager
def _half(message: Message, context: Context) -> Iterator[_Half]:
    quiet_libraries()
    run = from_run_config(context.run_config)
    ticket = Ticket.of(message.content)
    if ticket.config != run.fingerprint:
        raise ModelMismatch(
            f"the server runs configuration {ticket.config}, this client {run.fingerprint}; start "
            "both from the same code, conf/ and overrides"
        )
    wire = replace(run.wire, tls_ca=Node.of(context, run).tls_ca)
    with closing(GrpcLink(ticket.address, token=ticket.token, wire=wire)) as link:
        yield _Half(message, context, run, link)


@lru_cache(maxsize=4)
def _tokenizer(pretrained: str, revision: str, text: str) -> TokenizersBackend:
    return load_tokenizer(pretrained, revision) if pretrained else tokenizer_from_json(text)


@lru_cache(maxsize=64)
def _texts(data: DataSpec, sharding: ShardingSpec, seed: int, node: Node) -> tuple[Corpus, Corpus]:
    """A node's text to train on and its held-out text; the same in every round, so read once."""
    if node.data_path:
        corpus = load_corpus(replace(data, kind="text", path=node.data_path))
        return hold_out(corpus, data.held_out, seed)
    whole, held_out = hold_out(load_corpus(data), data.held_out, seed)
    return (
        shard(whole, sharding, node.partitions, seed)[node.partition],
        shard_held_out(held_out, sharding, node.partitions, seed)[node.partition],
    )


@lru_cache(maxsize=64)
def _sequences(
    data: DataSpec,
    sharding: ShardingSpec,
    seed: int,
    node: Node,
    named_tokenizer: tuple[str, str, str],
) -> tuple[Sequences, Sequences]:
    training, held_out = _texts(data, sharding, seed, node)
    tokenizer, length = _tokenizer(*named_tokenizer), data.sequence_length
    return tokenize(training, tokenizer, length), tokenize(held_out, tokenizer, length)
