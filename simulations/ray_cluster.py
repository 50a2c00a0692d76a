"""An existing Ray cluster, whose nodes run the simulated clients of a run.

Flower's simulation uses the cluster of RAY_ADDRESS. What Flower assumes is checked here before a
run begins: that all clients fit on the cluster at once, that its nodes have the same packages as
this machine, and that they can call the trunk.
"""

import socket
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from fedsplit.errors import ConfigError
from fedsplit.spec import RunSpec, WireSpec

_PACKAGES = ("fedsplit", "flwr", "ray", "torch", "transformers", "peft", "grpcio")
"""The packages that compute at a client, or that carry what it sends."""

_CONNECT_S = 10.0
_ANSWER_S = 60.0
"""The longest waits for the head's port, and for a node to start a process and answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayCluster:
    """A Ray cluster that runs.

    Attributes:
        address: The address of its head, host:port.
        here: The address of this machine at the cluster.
        cpus: The CPUs of each node, by its address; two nodes of one machine count together.
        versions: The versions of packages at each node, by its id; empty if one is missing.
    """

    address: str
    here: str
    cpus: Mapping[str, int]
    versions: Mapping[str, Mapping[str, str]]

    @staticmethod
    def found_at(address: str) -> "RayCluster":
        """Return the cluster at an address, host:port, or `auto` for that of this machine.

        Raises:
            ConfigError: Ray is not installed, or there is no cluster; or a node does not answer.
        """
        if not find_spec("ray"):
            raise ConfigError(
                f"launch.ray_address={address} needs Ray, which is not installed; "
                "pip install 'flwr[simulation]', or leave it out"
            )
        import ray

        try:
            if address != "auto":
                # Ray itself would try for minutes.
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
            with warnings.catch_warnings():
                # It tells how the clients' GPUs will be hidden in a future version.
                warnings.simplefilter("ignore", FutureWarning)
                context: Any = ray.init(address, log_to_driver=False, configure_logging=False)
        except (OSError, OverflowError, RuntimeError, ValueError) as exc:
            reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
            raise ConfigError(
                f"launch.ray_address={address} is no Ray cluster ({reason}); start one with `ray "
                "start --head`, or give HOST:PORT as that prints it"
            ) from exc
        try:
            nodes = [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
            cpus: dict[str, int] = {}
            for node in nodes:
                where = node["NodeManagerAddress"]
                cpus[where] = cpus.get(where, 0) + int(node["Resources"].get("CPU", 0))
            return RayCluster(
                address=context.address_info["gcs_address"],
                here=context.address_info["node_ip_address"],
                cpus=cpus,
                versions=_versions_of([node["NodeID"] for node in nodes]),
            )
        finally:
            ray.shutdown()

    def require(self, num_clients: int) -> None:
        """Require room for these clients at once, and the packages of this machine at each node.

        Raises:
            ConfigError: It cannot; the text names what is missing, and where.
        """
        # A client that waits for a CPU would be awaited at the trunk's barrier.
        if sum(self.cpus.values()) < num_clients:
            raise ConfigError(
                f"the Ray cluster {self.address} has {sum(self.cpus.values())} CPUs, and the run "
                f"simulates {num_clients} clients at once, one on each; start its nodes with a "
                "larger `ray start --num-cpus`, or lower clients"
            )
        ours = _reader()(_PACKAGES)
        for node, theirs in self.versions.items():
            wrong = [
                f"{name} {theirs[name] or 'is missing'} (here {ours[name]})"
                for name in _PACKAGES
                if theirs[name] != ours[name]
            ]
            if wrong:
                raise ConfigError(
                    f"node {node} of the Ray cluster {self.address} does not have the packages of "
                    f"this machine: {'; '.join(wrong)}; install the same versions there"
                )

    def reachable(self, run: RunSpec) -> RunSpec:
        """Return the run with a trunk that the cluster's nodes can call.

        Raises:
            ConfigError: Other machines are to call it without encryption.
        """
        if run.wire.bind != WireSpec().bind or set(self.cpus) <= {self.here}:
            return run
        return replace(run, wire=replace(run.wire, bind=f"{self.here}:0"))


def _versions_of(nodes: list[str]) -> dict[str, Mapping[str, str]]:
    """Ask each node for its versions of packages."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = {
        # Without a CPU, because another run of the cluster may have all of them.
        node: ray.remote(_reader())
        .options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False),
        )
        .remote(_PACKAGES)
        for node in nodes
    }
    try:
        return {node: ray.get(answer, timeout=_ANSWER_S) for node, answer in asked.items()}
    except (ray.exceptions.RayError, TimeoutError) as exc:
        raise ConfigError(f"a node of the Ray cluster does not answer: {exc}") from exc


def _reader() -> Callable[[tuple[str, ...]], Mapping[str, str]]:
    """Return a function that Ray sends by its code, since a node may lack this module."""

    def versions(packages: tuple[str, ...]) -> Mapping[str, str]:
        from importlib import metadata

        found = {}
        for name in packages:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = ""
        return found

    return versions
