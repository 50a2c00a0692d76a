"""The run in its real places: under `flwr run`, simulated and deployed, with real processes."""

import json
import os
import re
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
import tomli_w

from fedsplit.cli import main
from fedsplit.config import from_yaml
from fedsplit.runs.folder import RunFolder
from tests.edge.certified import certified
from tests.edge.federation import (
    federate,
    overrides_for,
    spec_for,
    without_seconds,
    write_corpus,
)
from tests.edge.nodes import SuperNodes
from tests.edge.processes import (
    BIN,
    PATIENCE_S,
    await_that,
    background,
    free_ports,
    marked,
    marking,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@contextmanager
def driver(*words: str) -> Iterator["subprocess.Popen[str]"]:
    """`python -m simulations.run launch=flwr ...`; SIGTERM makes it stop all it started."""
    command = [sys.executable, "-m", "simulations.run", "launch=flwr", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.terminate()


def output(process: "subprocess.Popen[str]") -> str:
    text, _ = process.communicate(timeout=PATIENCE_S)
    return text


# --- simulated -----------------------------------------------------------------------------------


STEPS = 50
"""Steps of a round: they take a second or more, so that a client can be killed in the middle."""
ROUNDS = (
    "train.rounds=3",
    f"train.local_steps={STEPS}",
    "train.save_every=1",
    "policy.deadline_s=5",
    "sharding=iid",
)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run under `flwr run`, of which a client was killed in the third round."""
    here = tmp_path_factory.mktemp("simulated")
    folder, mark = RunFolder(here / "runs" / "tiny"), str(here)
    # Flower's processes have other working directories.
    words = [*overrides_for(here, *ROUNDS), f"data.path={os.path.relpath(here, ROOT)}/corpus.txt"]
    words.append("launch.restarts=0")
    with marking(mark), driver(*words) as process:
        await_that(lambda: len(folder.rounds()) == 2 or process.poll() is not None)
        log = (folder.path / "flower.log").read_text(encoding="utf-8")
        port = int(re.findall(r"Trunk is served at 127\.0\.0\.1:(\d+)", log)[0])
        await_that(lambda: connected(mark, port) or process.poll() is not None)
        connected(mark, port)[0].kill()
        text = output(process)
    assert process.returncode == 0, text
    return folder


def test_flwr_run_gives_the_numbers_of_the_inline_run(simulated: RunFolder) -> None:
    inline = federate(spec_for(simulated.path.parents[1], *ROUNDS))
    undisturbed = [without_seconds(f.rounds()[:2]) for f in (inline, simulated)]
    assert undisturbed[0] == undisturbed[1]
    specs = [from_yaml((f.path / "config.yaml").read_text()) for f in (inline, simulated)]
    assert [spec.launch.kind for spec in specs] == ["inline", "flwr"]
    assert len({spec.fingerprint for spec in specs}) == 1
    saved = [weights_of(f.checkpoints / "round-0002") for f in (inline, simulated)]
    assert saved[0] and saved[0] == saved[1]


def weights_of(checkpoint: Path) -> dict[str, bytes]:
    """All tensors of a checkpoint: the parts and the trunk's moments."""
    return {file.name: file.read_bytes() for file in checkpoint.glob("*.safetensors")}


def test_a_client_that_is_killed_in_a_step_leaves_the_others_to_finish(
    simulated: RunFolder,
) -> None:
    rounds = simulated.rounds()
    assert [(stats.clients, stats.failed) for stats in rounds] == [(3, 0), (3, 0), (2, 1)]
    assert rounds[-1].version == 3 * STEPS


def connected(mark: str, port: int) -> list[psutil.Process]:
    """The simulated clients that are connected to the trunk."""
    return [
        process
        for process in marked(mark)
        if "ray::ClientApp" in process.cmdline()[0]
        and any(c.raddr and c.raddr.port == port for c in process.net_connections())
    ]


# --- deployed ------------------------------------------------------------------------------------


def answers(url: str, tls_ca: str) -> bool:
    trust = ssl.create_default_context(cafile=tls_ca)
    try:
        with urllib.request.urlopen(url, timeout=1.0, context=trust):
            return True
    except (urllib.error.URLError, OSError):
        return False


def test_a_superlink_and_two_supernodes_train_over_tls(tmp_path: Path) -> None:
    wire = certified(tmp_path / "tls")
    # A process for every message: moments, the place in the data and the bottom have to last.
    same = ["clients=2", "train.rounds=2", "client_weights=personal_bottom", "train.save_every=1"]
    same.append("train.evaluate_every=2")
    # A process for a message takes more than a minute to start on a machine that is busy.
    same += [f"launch.start_timeout_s={PATIENCE_S:g}", f"policy.deadline_s={PATIENCE_S:g}"]
    # The second has text of its own, and the server gives it the number that the first one leaves.
    text = write_corpus(tmp_path / "own", documents=30)
    machines = [
        {"partition-id": 0, "num-partitions": 2, "allowed-path": str(tmp_path)},
        {"data-path": str(text)},
    ]
    words = overrides_for(tmp_path, *same, f"wire.tls_cert={wire.tls_cert}")
    words += [f"wire.tls_key={wire.tls_key}"]
    results = tmp_path / "runs"
    place, home = tmp_path / "place", tmp_path / "home"
    place.mkdir()
    home.mkdir()
    env = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    link, *nodes = free_ports(3)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "127.0.0.1:{link}"\n'
        f'root-certificates = "{wire.tls_ca}"\n'
    )
    mark = tmp_path / "mark"
    hostile = ["sharding=partitioner", "sharding.target=subprocess.Popen"]
    hostile.append(f"'sharding.options={{args: [touch, {mark}]}}'")
    for name, more in {"run": [], "hostile": hostile}.items():
        config = {"overrides": " ".join([*words, *more]), "run-dir": str(tmp_path / f"{name}s")}
        (home / f"{name}.toml").write_text(tomli_w.dumps(config))
    with ExitStack() as deployment, marking(str(tmp_path)):
        superlink = ["flower-superlink", "--host", "127.0.0.1", "--port", str(link)]
        superlink += ["--ssl-certfile", wire.tls_cert, "--ssl-keyfile", wire.tls_key]
        superlink += ["--ssl-ca-certfile", wire.tls_ca]
        deployment.enter_context(background(*superlink, env=env, cwd=place))
        await_that(lambda: answers(f"https://127.0.0.1:{link}/health", wire.tls_ca))
        doctor = ["doctor", "--superlink", f"127.0.0.1:{link}", "--tls-ca", wire.tls_ca]
        assert main([*doctor, "--app", str(ROOT)]) == 0
        for number, (port, machine) in enumerate(zip(nodes, machines, strict=True)):
            config = {
                **machine,
                "tls-ca": wire.tls_ca,
                "state-dir": str(tmp_path / f"kept-{number}"),
            }
            node = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
            supernode = ["flower-supernode", "--superlink", f"127.0.0.1:{link}"]
            supernode += ["--root-certificates", wire.tls_ca]
            supernode += ["--port", str(port), "--node-config", node]
            deployment.enter_context(background(*supernode, env=env, cwd=place))
        flwr = {"env": env, "cwd": place, "capture_output": True, "text": True, "check": False}
        command = [str(BIN / "flwr"), "run", str(ROOT), "own", "--stream", "--run-config"]
        command.append(str(home / "hostile.toml"))
        refused = subprocess.run(command, timeout=PATIENCE_S, **flwr)
        command = [str(BIN / "fedsplit"), "supervise", str(ROOT), "own", "--state", "run.state"]
        command += ["--run-config", str(home / "run.toml")]
        done, again = (subprocess.run(command, timeout=PATIENCE_S, **flwr) for _ in range(2))
        listed = subprocess.run([str(BIN / "flwr"), "ls", "--format", "json"], **flwr)
    # A real SuperNode refuses it, and not only a client that this process pretends to be.
    refusal = "sharding.target=subprocess.Popen is not of fedsplit"
    assert refusal in refused.stdout, refused.stdout
    assert not mark.exists()
    statuses = sorted(each["status"] for each in json.loads(listed.stdout)["runs"])
    assert statuses == ["finished:completed", "finished:failed"], done.stdout
    # The second supervisor found that the run was over, and submitted no other one.
    assert (done.returncode, again.returncode) == (0, 0), done.stderr + again.stderr
    folder = RunFolder(results / "tiny")
    assert [(stats.clients, stats.failed) for stats in folder.rounds()] == [(2, 0), (2, 0)]
    kept = sorted(path.name for path in (tmp_path / "kept-1/tiny/client-1" / folder.id).iterdir())
    assert [name.rpartition("-")[0] for name in kept] == ["round-0001", "round-0002"]
    spec = from_yaml((folder.path / "config.yaml").read_text(encoding="utf-8"))
    plain = spec_for(tmp_path, *same)
    assert spec.wire.tls_cert and spec.model == plain.model
    pretended = [
        {**each, "state-dir": str(tmp_path / f"inline-{number}")}
        for number, each in enumerate(machines)
    ]
    rounds, inline = folder.rounds(), federate(plain, SuperNodes(configs=pretended)).rounds()
    assert [stats.loss for stats in rounds] == [stats.loss for stats in inline]
    assert rounds[-1].eval_loss == inline[-1].eval_loss
