"""The node of a client: its configuration from Flower, and its share of the data."""

import logging
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from operator import attrgetter
from pathlib import Path

from flwr.app import Context, UserConfig
from transformers import TokenizersBackend

from fedsplit import atomic
from fedsplit.config.authority import NODE_KEYS, Bounds
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
from fedsplit.errors import ConfigError, ProtocolError
from fedsplit.runs.folder import is_run_id
from fedsplit.spec import DataSpec, RunSpec, ShardingSpec, WireSpec

log = logging.getLogger("flwr.fedsplit")

KEPT_RUNS = 3
"""The number of runs of one name of which a client keeps checkpoints, however old they are."""
ACTIVE_S = 7 * 86_400.0
"""Seconds for which the checkpoints of a run are kept, however many newer runs there are."""

# The words are schemes of gRPC, so that unix:80 would be a path.
_HOST_AND_PORT = re.compile(
    r"(?!(unix|unix-abstract|vsock|dns|ipv4|ipv6|xds):)(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """The settings of one machine, from Flower's `--node-config`.

    `partition` of `partitions` is the node's share of a corpus that all clients have. With a
    `data_path` the node trains on all text in that path instead. `device` is the name of a torch
    device, `tls_ca` a file of trusted roots, `state_dir` the folder of the checkpoints from which
    a run is resumed, and `trunk_address` the address of the trunk, in place of the server's word.
    If the machine `trusts_runs`, a run may name anything on it.
    """

    partition: int
    partitions: int
    data_path: str
    device: str
    tls_ca: str
    state_dir: str
    trunk_address: str
    trusts_runs: bool

    @staticmethod
    def of(context: Context, run: RunSpec) -> "Node":
        """Read the node's config, and refuse a run that asks for more than it allows.

        Raises:
            ConfigError: The config does not give the node a partition of the run, or the run names
                something on this machine that the config does not allow.
        """
        settings = context.node_config
        trusts_runs = settings.get("trust-runs", _is_simulated())
        if not isinstance(trusts_runs, bool):
            raise ConfigError(
                f"trust-runs={trusts_runs!r} in the node's config must be true or false"
            )
        # A run that is not trusted sets no path and no device here.
        machine = run if trusts_runs else RunSpec()
        if not trusts_runs:
            _warn_of_no_effect(run, settings)
        node = Node(
            partition=int(settings.get("partition-id", -1)),
            partitions=int(settings.get("num-partitions", run.num_nodes)),
            data_path=str(settings.get("data-path", "")),
            device=str(settings.get("device", machine.launch.client_device)),
            tls_ca=str(settings.get("tls-ca", machine.wire.tls_ca)),
            state_dir=str(settings.get("state-dir", "")),
            trunk_address=str(settings.get("trunk-address", "")),
            trusts_runs=trusts_runs,
        )
        if not 0 <= node.partition < run.num_nodes or node.partitions != run.num_nodes:
            raise ConfigError(
                f"this node is partition {node.partition} of {node.partitions}, but the run has "
                f"clients={run.num_nodes}; start it with --node-config 'partition-id=I "
                f"num-partitions={run.num_nodes}', or a simulation with --federation-config "
                f"'num-supernodes={run.num_nodes}'"
            )
        if not trusts_runs:
            Bounds(
                path=str(settings.get("allowed-path", "")),
                targets=tuple(str(settings.get("targets", "")).split()),
                reads_corpus=not node.data_path,
            ).check(run)
        return node

    @property
    def name(self) -> str:
        """The client's name in the run; the same in every run of the same partition."""
        return f"client-{self.partition}"

    def checkpoints_of(self, run: RunSpec, run_id: str) -> Path | None:
        """Return the folder of this client's checkpoints of a run; None if it has no checkpoints.

        A run has none without `train.save_every`, and neither has a client if the node's config
        has no folder for them. Each run has its own folder, so runs of the same name do not
        overwrite one another.

        Raises:
            ConfigError: The server sent a run id in another format.
        """
        # The id comes from a peer and becomes part of a path, so only hex digits are accepted.
        if not is_run_id(run_id):
            raise ConfigError(
                f"the server sent the run id {run_id!r}, but an id is 16 hex digits; start both "
                "sides from the same code"
            )
        if not run.train.save_every or not (self.state_dir or self.trusts_runs):
            return None
        shared = Path(run.launch.run_dir) / run.name / "clients"
        parent = Path(self.state_dir) / run.name if self.state_dir else shared
        return parent / self.name / run_id

    def wire_of(self, run: RunSpec) -> WireSpec:
        """Return the run's wire, with this machine's own file of trusted roots."""
        return replace(run.wire, tls_ca=self.tls_ca)

    def address_of_trunk(self, given: str) -> str:
        """Return the address at which this client calls the trunk.

        Args:
            given: The address that the server sent.

        Raises:
            ProtocolError: The server sent no host and port.
        """
        # gRPC also takes paths of sockets of this machine, such as unix:/var/run/docker.sock.
        if not (self.trunk_address or self.trusts_runs or _HOST_AND_PORT.fullmatch(given)):
            raise ProtocolError(
                f"the server sent the address {given!r} of its trunk, but a client's machine calls "
                "host:port only; set wire.advertise=host:port"
            )
        return self.trunk_address or given


def _warn_of_no_effect(run: RunSpec, settings: UserConfig) -> None:
    """Log the run's settings that only this machine may set, if it does not."""
    # The server's machine uses launch.run_dir in any case.
    for field in ("wire.tls_ca", "launch.client_device"):
        value, key = attrgetter(field)(run), NODE_KEYS[field]
        if value != attrgetter(field)(RunSpec()) and key not in settings:
            text = "%s=%s of the run has no effect on this machine; --node-config sets it as %s"
            log.warning(text, field, value, key)


def _is_simulated() -> bool:
    """Return whether Flower simulates the node, in a process of the user who started the run."""
    # Flower's simulations work in processes of Ray, and a SuperNode's do not.
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def remove_old_runs(parent: Path, now: float) -> None:
    """Remove a client's checkpoints of old runs of one name, and log each folder removed.

    The `KEPT_RUNS` runs that were active last are kept, and every run that was active within
    `ACTIVE_S` seconds before `now`, because such a run may still train or may be resumed.

    Args:
        parent: The client's folder, which has a folder for each run id.
        now: The time, in seconds since the epoch.
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
    """The tokenizer and classes that turn documents into tensors, equal at all clients.

    `tokenizer` is JSON; it is empty for a pretrained model, which has its own tokenizer.
    """

    tokenizer: str
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Share:
    """A client's training and held-out examples: one `Examples` for each partition that it has.

    A client has one partition. The node of `baseline=central` has those of all clients.
    """

    run: RunSpec
    training: tuple[Examples, ...]
    held_out: tuple[Examples, ...]

    def __len__(self) -> int:
        """Return the number of training examples."""
        return sum(map(len, self.training))

    def require_full_batches(self, client: str) -> None:
        """Refuse batches that are larger than the training data, since rows would repeat in them.

        Raises:
            ConfigError: `train.batch_size` is larger; the text has both numbers.
        """
        train, smallest = self.run.train, min(map(len, self.training))
        if train.batch_size > smallest:
            raise ConfigError(
                f"{client} has {smallest} training examples, but train.batch_size="
                f"{train.batch_size}; set train.batch_size={smallest} or less, or give the client "
                "more data"
            )
        if train.batch_size * train.accumulation > smallest:
            raise ConfigError(
                f"{client} has {smallest} training examples, but train.accumulation="
                f"{train.accumulation} batches of train.batch_size={train.batch_size} are "
                f"{train.batch_size * train.accumulation}; lower one of them, or give the client "
                "more data"
            )

    def groups(self, start: int, num_steps: int) -> Iterator[Sequence[Batch]]:
        """Yield the batches of each of the next `num_steps` optimizer steps.

        Args:
            start: The number of batches already read from each partition.
            num_steps: The number of optimizer steps.
        """
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
        # A step of `baseline=central` reads from every partition what its client would read.
        for _ in range(num_steps):
            yield [batch for stream in streams for batch in islice(stream, train.accumulation)]

    def evaluation(self) -> Iterator[Batch]:
        """Yield all held-out batches."""
        size = self.run.train.batch_size
        return chain.from_iterable(evaluation_batches(own, size) for own in self.held_out)


def texts_of(run: RunSpec, node: Node) -> tuple[tuple[Corpus, ...], tuple[Corpus, ...]]:
    """Return a node's training and held-out documents, which are read once for all rounds."""
    with _cache_lock:
        if node.data_path:
            # The embedded text has no path, so a path of one's own is read as text files.
            kind = "text" if run.data.kind == "embedded" else run.data.kind
            own = replace(run.data, kind=kind, path=node.data_path)
            training, held_out = own_corpora(own, run.task, run.seed)
            return (training,), (held_out,)
        partitions, held_out_partitions = partitions_of(
            run.data, run.task, run.sharding, run.clients, run.seed
        )
    if run.baseline == "central":
        return partitions, held_out_partitions
    return (partitions[node.partition],), (held_out_partitions[node.partition],)


def share_of(run: RunSpec, node: Node, preparation: Preparation) -> Share:
    """Return a node's examples, which are made once for all rounds."""
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
    """Return the run's tokenizer; None for images."""
    return _prepared_of(run, preparation).tokenizer


# --- caches that last from message to message -------------------------------------------------
#
# The caches hold one run: a process that simulates all clients keeps one corpus and its examples,
# however many clients there are, and nothing of the run before.

_cache_lock = threading.Lock()
"""Held while a cache is read: `lru_cache` lets each thread compute a missing entry."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Prepared:
    """The tokenizer of a run, and the examples of the nodes in this process."""

    tokenizer: TokenizersBackend | None
    shares: dict[Node, Share]


@lru_cache(maxsize=1)
def partitions_of(
    data: DataSpec, task: str, sharding: ShardingSpec, clients: int, seed: int
) -> tuple[tuple[Corpus, ...], tuple[Corpus, ...]]:
    """Return the training shards and the held-out shards of all clients."""
    whole, rest = hold_out(load_corpus(data, task), data.held_out, seed)
    # The training corpus first: an error about it says more to the user.
    training = shard(whole, sharding, clients, seed)
    return training, shard_held_out(rest, sharding, clients, seed)


@lru_cache(maxsize=1)
def own_corpora(data: DataSpec, task: str, seed: int) -> tuple[Corpus, Corpus]:
    """Return the training and held-out part of a corpus that one client alone has."""
    return hold_out(load_corpus(data, task), data.held_out, seed)


def _prepared_of(run: RunSpec, preparation: Preparation) -> _Prepared:
    with _cache_lock:
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
