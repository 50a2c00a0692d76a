"""The node of a client: its configuration from Flower."""

import logging
import re
import sys
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path

from flwr.app import Context, UserConfig

from fedsplit import atomic
from fedsplit.client.seal import Seal
from fedsplit.config.authority import NODE_KEYS, PRIVACY_KEYS, Bounds
from fedsplit.errors import ConfigError, ProtocolError
from fedsplit.runs.folder import is_run_id
from fedsplit.spec import PrivacySpec, RunSpec, WireSpec
from fedsplit.telemetry.outlets import Outlets

log = logging.getLogger(__name__)

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
    `data_path` the node trains on all text in that path instead; without a partition in its config,
    the server then assigns one (`is_assigned`), which is -1 until the node learns it. `device` is
    the name of a torch device, `tls_ca` a file of trusted roots, `state_dir` the folder of the
    checkpoints from which a run is resumed, and `trunk_address` the address of the trunk, in place
    of the server's word.
    If the machine `trusts_runs`, a run may name anything on it. `privacy` is the run's, with what
    the node's config sets in place of it, and `seal_key` the file of the key that clients share.
    `metrics` is the address at which Prometheus reads the client's metrics, and `traces` the folder
    of its traces; empty for none.
    """

    partition: int
    partitions: int
    data_path: str
    device: str
    tls_ca: str
    state_dir: str
    trunk_address: str
    trusts_runs: bool
    privacy: PrivacySpec = field(default_factory=PrivacySpec)
    seal_key: str = ""
    metrics: str = ""
    traces: str = ""
    is_assigned: bool = False

    @staticmethod
    def of(context: Context, run: RunSpec, assigned: str = "") -> "Node":
        """Read the node's config, and refuse a run that asks for more than it allows.

        Args:
            context: The context of the node, with its config.
            run: The run.
            assigned: The name of the client that the server assigned; "" before it has done so.

        Raises:
            ConfigError: The config does not give the node a partition of the run, or the run names
                something on this machine that the config does not allow.
            ProtocolError: The server assigned a name that no client of the run has.
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
        is_assigned = "data-path" in settings and "partition-id" not in settings
        node = Node(
            partition=_number_of(assigned, run)
            if is_assigned
            else int(settings.get("partition-id", -1)),
            partitions=int(settings.get("num-partitions", run.num_nodes)),
            data_path=str(settings.get("data-path", "")),
            device=str(settings.get("device", machine.launch.client_device)),
            tls_ca=str(settings.get("tls-ca", machine.wire.tls_ca)),
            state_dir=str(settings.get("state-dir", "")),
            trunk_address=str(settings.get("trunk-address", "")),
            trusts_runs=trusts_runs,
            privacy=_privacy_of(run, settings),
            seal_key=str(settings.get("seal-key", "")),
            # In a simulation, another process than the clients' has the address: the server's.
            metrics=str(settings.get("metrics", "" if _is_simulated() else machine.launch.metrics)),
            traces=str(settings.get("traces", machine.launch.traces)),
            is_assigned=is_assigned,
        )
        has_partition = is_assigned or 0 <= node.partition < run.num_nodes
        if not has_partition or node.partitions != run.num_nodes:
            raise ConfigError(
                f"this node is partition {node.partition} of {node.partitions}, but the run has "
                f"clients={run.num_nodes}; start it with --node-config 'partition-id=I "
                f"num-partitions={run.num_nodes}', or with data-path alone, or a simulation with "
                f"--federation-config 'num-supernodes={run.num_nodes}'"
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
        """The client's name in the run; "" until the server has assigned it."""
        return f"client-{self.partition}" if self.partition >= 0 else ""

    def known_as(self, run: RunSpec, run_id: str) -> "Node":
        """Return the node with the partition that it was assigned in this run before.

        Raises:
            ConfigError: The server sent a run id in another format, or `state_dir` has the states
                of several clients of the run.
        """
        _require_run_id(run_id)
        if not (self.is_assigned and self.state_dir):
            return self
        names = [p.parent.name for p in Path(self.state_dir, run.name).glob(f"client-*/{run_id}")]
        if len(names) > 1:
            raise ConfigError(
                f"state-dir={self.state_dir} has the states of {', '.join(sorted(names))}; give "
                "each SuperNode a state-dir of its own, or its partition-id"
            )
        return replace(self, partition=_number_of(names[0], run)) if names else self

    def keeps_states(self, run: RunSpec) -> bool:
        """Whether this machine has a place for checkpoints, and the run has some."""
        return bool(run.train.save_every and (self.state_dir or self.trusts_runs))

    def checkpoints_of(self, run: RunSpec, run_id: str) -> Path | None:
        """Return the folder of this client's checkpoints of a run; None if it can have none.

        A run has none without `train.save_every`, and neither has a client if the node's config
        has no folder for them. Each run has its own folder, so runs of the same name do not
        overwrite one another.

        Raises:
            ConfigError: The server sent a run id in another format.
        """
        _require_run_id(run_id)
        if not self.name or not self.keeps_states(run):
            return None
        shared = Path(run.launch.run_dir) / run.name / "clients"
        parent = Path(self.state_dir) / run.name if self.state_dir else shared
        return parent / self.name / run_id

    def secrets_of(self, run: RunSpec, run_id: str) -> Path:
        """Return the folder of the noise key and the ledger, which outlast a run.

        In a simulation they are the run's own. A node whose partition the server assigns has one
        folder, because its text is the same under every name.

        Raises:
            ConfigError: The node's config has no folder for them.
        """
        if self.state_dir:
            return Path(self.state_dir) / "privacy" / ("own" if self.is_assigned else self.name)
        if not self.trusts_runs:
            raise ConfigError(
                f"privacy={self.privacy.kind} keeps a noise key and a ledger on this machine; "
                "start its SuperNode with state-dir in --node-config"
            )
        return Path(run.launch.run_dir) / run.name / "privacy" / run_id / self.name

    def outlets_of(self, run: RunSpec) -> Outlets:
        """Return where the events of a client of this run go."""
        return Outlets(
            metrics=self.metrics,
            traces=self.traces,
            trace_share=run.launch.trace_share,
            clients=(self.name,) if run.launch.client_labels else (),
        )

    def seal_of(self, run: RunSpec, run_id: str) -> Seal | None:
        """Return the seal of the clients of a run; None if the run has none.

        Raises:
            ConfigError: The node's config names no file with a key.
        """
        if not run.client_weights.sealed:
            return None
        if self.seal_key:
            return Seal.of(Path(self.seal_key))
        if not self.trusts_runs:
            raise ConfigError(
                "client_weights.sealed needs the key that all clients share; start each SuperNode "
                "with seal-key=FILE in --node-config"
            )
        return Seal.kept(self.secrets_of(run, run_id).parent / "seal.key")

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


def _require_run_id(run_id: str) -> None:
    # The id comes from a peer and becomes part of a path, so only hex digits are accepted.
    if not is_run_id(run_id):
        raise ConfigError(
            f"the server sent the run id {run_id!r}, but an id is 16 hex digits; start both "
            "sides from the same code"
        )


def _number_of(client: str, run: RunSpec) -> int:
    """Return the partition of a client of the run by its name; -1 for no name.

    Raises:
        ProtocolError: The run has no client of this name.
    """
    names = ["", *run.client_names]
    if client not in names:
        raise ProtocolError(
            f"the server assigned the name {client!r}, but the clients of the run are client-0 to "
            f"client-{run.num_nodes - 1}; run the same code at both sides"
        )
    return names.index(client) - 1


def _privacy_of(run: RunSpec, settings: UserConfig) -> PrivacySpec:
    """Return the privacy of a node: the run's, with what the node's config sets.

    If the node sets `privacy`, the noise that it does not set is at least that of the default.

    Raises:
        ConfigError: A value is not allowed, the node sets sizes and no `privacy`, or the run would
            undo the protection.
    """
    given = {name: settings[key] for name, key in PRIVACY_KEYS.items() if key in settings}
    for name, value in given.items():
        kind = type(getattr(PrivacySpec(), name))
        # A whole number is a number too.
        if not isinstance(value, (int, float) if kind is float else kind) or value is True:
            raise ConfigError(
                f"{PRIVACY_KEYS[name]}={value!r} in the node's config must be "
                f"{'a number' if kind is float else 'text'}"
            )
    if "kind" not in given and given.keys() - {"public"}:
        keys = ", ".join(PRIVACY_KEYS[name] for name in given)
        raise ConfigError(
            f"{keys} in the node's config has no effect if the run says privacy=off; set privacy "
            "in the node's config too"
        )
    default, least = PrivacySpec(), run.privacy
    if "kind" in given:
        least = replace(
            least,
            z=max(least.z, default.z),
            gradient_z=max(least.gradient_z, default.gradient_z),
        )
    privacy = replace(least, **given)  # type: ignore[arg-type]  # checked above
    try:
        # Together, they must make a run.
        replace(run, privacy=privacy)
    except ConfigError as exc:
        raise ConfigError(f"the privacy of this node does not go with the run: {exc}") from exc
    return privacy


def _warn_of_no_effect(run: RunSpec, settings: UserConfig) -> None:
    """Log the run's settings that only this machine may set, if it does not."""
    # The server's machine uses launch.run_dir in any case.
    for name in ("wire.tls_ca", "launch.client_device"):
        value, key = attrgetter(name)(run), NODE_KEYS[name]
        if value != attrgetter(name)(RunSpec()) and key not in settings:
            text = "%s=%s of the run has no effect on this machine; --node-config sets it as %s"
            log.warning(text, name, value, key)


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
