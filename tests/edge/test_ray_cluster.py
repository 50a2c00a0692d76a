"""A simulation on a Ray cluster that exists: the same numbers, and what is refused before it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from fedsplit.errors import ConfigError
from fedsplit.runs.folder import RunFolder
from fedsplit.spec import LaunchSpec
from simulations.ray_cluster import RayCluster
from simulations.single import run_one
from tests.edge.federation import federate, joined, spec_for, without_seconds

CLUSTER = RayCluster(
    address="10.0.0.1:6379", here="10.0.0.1", cpus={"10.0.0.1": 2, "10.0.0.2": 2}, versions={}
)


NODES = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster()
cluster.add_node(wait=False, num_cpus=1, include_dashboard=False)
cluster.add_node(wait=False, num_cpus=1)
cluster.wait_for_nodes(timeout=300)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, Path]]:
    """The address of a cluster of two nodes on this machine, with two CPUs, and its logs."""
    # Ray puts Unix sockets in it, whose paths are short.
    with (
        TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        subprocess.Popen(
            [sys.executable, "-c", NODES],
            env={**os.environ, "RAY_TMPDIR": folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process,
    ):
        assert process.stdin and process.stdout
        address = process.stdout.readline().strip()
        assert address, "the cluster did not start"
        yield address, Path(folder, "ray", "session_latest", "logs")
        process.stdin.close()
        process.wait()


@pytest.mark.slow
def test_a_run_on_two_nodes_has_the_numbers_of_a_run_in_one_process(
    cluster: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each client works at once, on a CPU of the cluster."""
    address, logs = cluster
    there = "launch=flwr", f"launch.ray_address={address}", "launch.start_timeout_s=600"
    inline = federate(spec_for(tmp_path, "name=inline", "clients=2"))
    run_one(spec_for(tmp_path, "name=there", "clients=2", *there))
    done = RunFolder(tmp_path / "runs" / "there")
    for node in ("raylet.out", "raylet.1.out"):
        assert "ClientAppActor" in (logs / node).read_text(encoding="utf-8")
    assert without_seconds(done.rounds()) == without_seconds(inline.rounds())
    one, other = joined(inline), joined(done)
    assert all(torch.equal(one[name], other[name]) for name in one)
    capsys.readouterr()
    with pytest.raises(ConfigError, match="has 2 CPUs, and the run simulates 3 clients at once"):
        run_one(spec_for(tmp_path, "name=more", "clients=3", *there))
    assert not (tmp_path / "runs" / "more").exists()


def test_a_cluster_must_be_there() -> None:
    """The error says how to start one."""
    with pytest.raises(ConfigError, match=r"launch.ray_address=127.0.0.1:9 is no Ray cluster .*"):
        RayCluster.found_at("127.0.0.1:9")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"ray_address": "auto"}, "set launch=flwr and launch.workers=0"),
        ({"ray_address": "auto", "kind": "flwr", "workers": 2}, "set launch=flwr and"),
        ({"ray_address": "a cluster", "kind": "flwr"}, "HOST:PORT, or auto"),
    ],
)
def test_other_settings_must_go_with_it(settings: dict[str, object], named: str) -> None:
    """A cluster is for launch=flwr, and its CPUs are the workers."""
    with pytest.raises(ConfigError, match=named):
        LaunchSpec(**settings)  # type: ignore[arg-type]


def test_nodes_need_the_packages_of_this_machine() -> None:
    """The error names each package that a node lacks, or has in another version."""
    ours = dict.fromkeys(("fedsplit", "flwr", "ray", "torch", "transformers", "peft", "grpcio"), "")
    there = replace(CLUSTER, versions={"abc": {**ours, "flwr": "1.0.0"}})
    with pytest.raises(ConfigError, match=r"node abc of .* fedsplit is missing .* flwr 1.0.0 \(h"):
        there.require(2)


def test_the_trunk_listens_where_other_machines_reach_it(tmp_path: Path) -> None:
    """On one machine it stays on loopback; beyond it, it needs TLS as in a deployment."""
    run = spec_for(tmp_path, "launch=flwr", "launch.ray_address=auto")
    assert replace(CLUSTER, cpus={"10.0.0.1": 4}).reachable(run) == run
    with pytest.raises(ConfigError, match="set wire.tls_cert and wire.tls_key"):
        CLUSTER.reachable(run)
    secured = replace(run, wire=replace(run.wire, tls_cert="cert.pem", tls_key="key.pem"))
    assert CLUSTER.reachable(secured).wire.bind == "10.0.0.1:0"
    chosen = replace(secured, wire=replace(secured.wire, bind="10.0.0.9:7000"))
    assert CLUSTER.reachable(chosen) == chosen
