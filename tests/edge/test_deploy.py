"""The files in `deploy/`: their commands run, and tools of their formats accept them.

A tool that is not installed is skipped.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
import yaml

from fedsplit.cli.systemd import notify
from fedsplit.runs.folder import RunFolder
from simulations.bench.certificate import self_signed
from tests.edge.certified import certified
from tests.edge.deploying import COMPOSE, DEPLOY, DOCKERFILE, composed, replaced
from tests.edge.forked import Program
from tests.edge.processes import BIN, PATIENCE_S, await_that, background, free_ports, marking
from tests.edge.tiny_models import make_model
from tests.house.source import ROOT

UNIT = DEPLOY / "systemd" / "fedsplit-trunk.service"


def accepted_by(tool: str, *words: str) -> str:
    """What a tool prints when it accepts files."""
    command = shutil.which(tool, path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    if not command:
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run([command, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- systemd --------------------------------------------------------------------------------------


def test_a_trunk_server_reports_to_systemd_that_it_is_ready_and_that_it_stops(
    tmp_path, monkeypatch
):
    make_model(tmp_path / "model")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(120.0)
        model = ["--model", tmp_path / "model", "--bind", "127.0.0.1:0"]
        with Program("fedsplit", "serve", *model) as server:
            assert systemd.recv(64) == b"READY=1"
            port = int(re.search(r" at 127\.0\.0\.1:(\d+);", server.stdout.readline())[1])
            socket.create_connection(("127.0.0.1", port)).close()
            server.send_signal(signal.SIGTERM)
            assert systemd.recv(64) == b"STOPPING=1"
            assert server.end(30.0)[0] == 0


def test_a_socket_of_systemd_that_is_gone_stops_no_server(monkeypatch, caplog):
    monkeypatch.setenv("NOTIFY_SOCKET", "@fedsplit-test-nobody-listens")
    notify("READY=1")
    assert "does not receive READY=1 at NOTIFY_SOCKET=@fedsplit-test" in caplog.text


def test_the_unit_is_exposed_to_little():
    accepted_by("systemd-analyze", "security", "--offline=true", "--threshold=20", str(UNIT))


# --- compose --------------------------------------------------------------------------------------


def test_compose_accepts_the_file():
    accepted_by("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE))


def test_prometheus_accepts_its_configuration_in_compose(tmp_path):
    content = yaml.safe_load(COMPOSE.read_text("utf-8"))["configs"]["prometheus"]["content"]
    (tmp_path / "prometheus.yml").write_text(content)
    shutil.copy(DEPLOY / "prometheus" / "rules.yml", tmp_path)
    accepted_by("promtool", "check", "config", str(tmp_path / "prometheus.yml"))
    jobs = yaml.safe_load(content)["scrape_configs"]
    targets = [target for job in jobs for target in job["static_configs"][0]["targets"]]
    assert {target.partition(":")[0] for target in targets} <= composed().keys()


PATIENT = f"launch.start_timeout_s={PATIENCE_S:g} policy.deadline_s={PATIENCE_S:g}"
"""A process for a message takes more than a minute to start on a machine that is busy."""


@pytest.mark.slow
def test_the_commands_of_compose_train_a_run(tmp_path):
    wire = self_signed(tmp_path, "server")
    (tmp_path / "superexec.secret").write_bytes(os.urandom(32))
    services = {name: each for name, each in composed().items() if each["image"] == "fedsplit"}
    link, trunk, *others = free_ports(2 + 2 * len(services))
    here: dict[str, object] = {
        "/etc/fedsplit/ca.crt": wire.tls_ca,
        "/etc/fedsplit/server.crt": wire.tls_cert,
        "/etc/fedsplit/server.key": wire.tls_key,
        "/etc/fedsplit": tmp_path,
        "superlink:": "127.0.0.1:",
        "serverapp:": "127.0.0.1:",
        "0.0.0.0:9601": "127.0.0.1:0",
        "0.0.0.0:9600": "127.0.0.1:0",
        "0.0.0.0": "127.0.0.1",
        "9092": link,
        "9500": trunk,
    }
    with marking(str(tmp_path)), ExitStack() as deployment:
        for name, service in services.items():
            state, health, own = tmp_path / name, others.pop(), others.pop()
            replacements = {**here, "/state": state, "9190": health}
            command = [replaced(word, replacements) for word in service["command"]]
            if command[0] == "flower-supernode":
                # In a container, each has the default port to itself.
                command.append(f"--port={own}")
            state.mkdir()
            env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
            env |= {"FLWR_HOME": str(state / "flower"), "HOME": str(state)}
            deployment.enter_context(background(*command, env=env, cwd=state))
            check = [replaced(word, replacements) for word in service["healthcheck"]["test"][2:]]
            await_that(lambda check=check: succeeds(sys.executable, *check))
        home = tmp_path / "home"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink.federation]\naddress = "127.0.0.1:{link}"\n'
            f'root-certificates = "{wire.tls_ca}"\n'
        )
        run = replaced((DEPLOY / "run.toml").read_text("utf-8"), {**here, "/state": tmp_path})
        run = run.replace("wire.bind", f"{PATIENT} wire.bind", 1)
        (tmp_path / "run.toml").write_text(run + "rounds = 1\nlocal-steps = 1\n")
        submit = ["run", str(ROOT), "federation", "--stream", "--run-config"]
        done = subprocess.run(
            [str(BIN / "flwr"), *submit, str(tmp_path / "run.toml")],
            env={**os.environ, "FLWR_HOME": str(home), "FLWR_DISABLE_UPDATE_CHECK": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )
    folder = RunFolder(tmp_path / "runs" / "toy")
    assert folder.is_finished, done.stdout
    assert [(stats.clients, stats.failed) for stats in folder.rounds()] == [(2, 0)]


def succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# --- Kubernetes -----------------------------------------------------------------------------------


PODS = {"trunk": ["trunk"], "federation": ["superlink", "serverapp"]}
"""The pods of what is applied to a cluster."""
SETS = [(deployment, pod) for deployment, pods in PODS.items() for pod in pods]


@cache
def rendered(folder: str) -> str:
    """What is applied to a cluster."""
    return accepted_by("kubectl", "kustomize", str(DEPLOY / "kubernetes" / folder))


def resources(folder: str, name: str) -> dict[str, Any]:
    """The resources of a name, by their kind."""
    found = yaml.safe_load_all(rendered(folder))
    return {each["kind"]: each for each in found if each["metadata"]["name"] == name}


def container_in(file: str) -> Any:
    """The container of a manifest's first resource."""
    server, *_ = yaml.safe_load_all((DEPLOY / "kubernetes" / file).read_text("utf-8"))
    (container,) = server["spec"]["template"]["spec"]["containers"]
    return container


@pytest.mark.parametrize("version", ["1.34", "1.35", "1.36", "1.37"])
def test_kubernetes_accepts_the_manifests(version, tmp_path):
    manifests = [tmp_path / f"{deployment}.yaml" for deployment in PODS]
    for manifest in manifests:
        manifest.write_text(rendered(manifest.stem))
    accepted_by("kubernetes-validate", "--strict", "-k", version, *map(str, manifests))


def test_prometheus_of_a_cluster_reads_the_pods_and_has_the_alerts():
    found = list(yaml.safe_load_all(rendered("monitoring")))
    (alerts,) = (each["spec"] for each in found if each["kind"] == "PrometheusRule")
    assert alerts == yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text("utf-8"))
    monitors = {each["metadata"]["name"]: each["spec"] for each in found if each["spec"] != alerts}
    assert monitors.keys() == {"trunk", "serverapp"}
    for deployment, pod in (("trunk", "trunk"), ("federation", "serverapp")):
        service, monitor = resources(deployment, pod)["Service"], monitors[pod]
        labels = service["metadata"]["labels"]
        assert monitor["selector"]["matchLabels"].items() <= labels.items()
        (endpoint,) = monitor["endpoints"]
        assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    # Only the alert that a server is down looks at the job.
    assert labels[monitors["trunk"]["jobLabel"]] == "fedsplit"
    (job,) = monitors["serverapp"]["endpoints"][0]["relabelings"]
    assert job == {"targetLabel": "job", "replacement": "fedsplit-runs"}


@pytest.mark.parametrize(("deployment", "name"), SETS)
def test_every_pod_has_its_service_its_budget_its_policy_and_few_rights(deployment, name):
    found = resources(deployment, name)
    specs = {kind: each.get("spec") for kind, each in found.items()}
    template = specs["StatefulSet"]["template"]
    labels, pod = template["metadata"]["labels"], template["spec"]
    assert labels["app.kubernetes.io/component"] == name
    selectors = [specs[kind]["selector"] for kind in ("StatefulSet", "PodDisruptionBudget")]
    selectors.append(specs["NetworkPolicy"]["podSelector"])
    assert [each["matchLabels"] for each in selectors] == [labels] * 3
    assert specs["Service"]["selector"] == labels
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    (container,) = pod["containers"]
    may = container["securityContext"]
    assert may["readOnlyRootFilesystem"] and may["capabilities"] == {"drop": ["ALL"]}
    ports = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in specs["Service"]["ports"]} == ports
    allowed = [port for rule in specs["NetworkPolicy"]["ingress"] for port in rule["ports"]]
    assert {port["port"] for port in allowed} == ports


@pytest.mark.parametrize("name", PODS["federation"])
def test_the_pods_of_a_federation_run_the_commands_of_compose(name):
    container = container_in(f"federation/{name}.yaml")
    # The probes come from outside of the pod.
    health = {"--health-server-address=127.0.0.1:9190": "--health-server-address=0.0.0.0:9190"}
    command = composed()[name]["command"]
    assert container["command"] == [health.get(word, word) for word in command]
    assert container["livenessProbe"]["grpc"]["port"] == 9190


# --- trunk servers --------------------------------------------------------------------------------


def in_image() -> tuple[list[str], list[str]]:
    """The command of a trunk server, and its health check."""
    text = DOCKERFILE.read_text("utf-8").replace("\\\n", "")
    check, serve = re.findall(r"^(?:HEALTHCHECK .*)?CMD (\[.*\])$", text, re.M)
    return json.loads(serve), json.loads(check)


def in_cluster() -> tuple[list[str], list[str]]:
    container = container_in("trunk/statefulset.yaml")
    return container["command"], container["livenessProbe"]["exec"]["command"]


def in_unit() -> tuple[list[str], list[str]]:
    text = UNIT.read_text("utf-8").replace("\\\n", "")
    (serve,) = re.findall(r"^ExecStart=\S+/(fedsplit .*) \$OPTIONS$", text, re.M)
    _, check = in_image()
    return shlex.split(serve), check


@pytest.mark.parametrize("commands", [in_image, in_cluster, in_unit])
def test_a_trunk_server_answers_its_health_check(commands, tmp_path):
    make_model(tmp_path / "model")
    wire = certified(tmp_path / "tls")
    (tmp_path / "token").write_text("secret")
    port, metrics = free_ports(2)
    replacements = {
        "/etc/fedsplit/ca.crt": wire.tls_ca,
        "/etc/fedsplit/server.crt": wire.tls_cert,
        "/etc/fedsplit/tls.crt": wire.tls_cert,
        "/etc/fedsplit/server.key": wire.tls_key,
        "/etc/fedsplit/tls.key": wire.tls_key,
        "/etc/fedsplit/": f"{tmp_path}/",
        "%d/server.key": wire.tls_key,
        "%d/": f"{tmp_path}/",
        "%S/": f"{tmp_path}/state/",
        "/state/trunk": tmp_path / "state" / "trunk",
        "${MODEL}": tmp_path / "model",
        "$(SPLIT)": "1/*/1",
        "%H:": "localhost:",
        ":9500": f":{port}",
        ":9600": f":{metrics}",
    }
    serve, check = ([replaced(word, replacements) for word in words] for words in commands())
    serve = [re.sub(r"^(--model=)?/model$", rf"\1{tmp_path}/model", word) for word in serve]
    with Program(*serve) as server:
        assert server.stdout.readline().startswith("serving model"), server.end(5.0)
        code, output, errors = Program(*check).end()
        assert (code, errors) == (0, "")
        assert "fingerprint of model and cut" in output


def test_the_image_is_made_as_hadolint_advises():
    accepted_by("hadolint", str(DOCKERFILE))
