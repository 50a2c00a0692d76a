"""`fedsplit doctor`: a healthy machine passes every check, and each fault fails its own."""

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from flwr.superlink.main import create_app

from fedsplit.certs import pem
from fedsplit.certs.authority import Authority
from fedsplit.cli import main
from fedsplit.config.authority import NODE_CONFIG, PRIVACY_KEYS
from fedsplit.doctor.data import check_node_config
from fedsplit.doctor.examination import examine
from fedsplit.doctor.network import ask_trunk
from fedsplit.doctor.result import State
from fedsplit.doctor.subject import SWITCH, FlowerProcess, Machine, Subject, installs
from fedsplit.doctor.versions import versions_tested
from fedsplit.model.build import split_model
from fedsplit.model.lora import add_adapters, save_adapter
from fedsplit.serve import Served, hosted
from fedsplit.spec import LoraSpec, RunSpec, SplitSpec, WireSpec
from tests.edge.certified import certified
from tests.edge.echo import EchoService, serving
from tests.edge.tiny_models import make_model
from tests.house.source import ROOT

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
ON = {SWITCH: "1"}
TOKEN = "a-token"
RUN = RunSpec(split=SplitSpec.parse("1/2/1"))
APP = """
[project]
name = "app"
version = "1.0.0"
description = "An app"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41,<1.42"]
[tool.flwr.app]
publisher = "me"
fab-format-version = 1
flwr-version-target = "1.41.0"
[tool.flwr.app.components]
serverapp = "app.server:app"
clientapp = "app.client:app"
"""


APP_FILES = ("app/app/server.py", "app/app/client.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A folder with all files of a deployment, and the addresses of its two servers."""

    folder: Path
    trunk: str
    superlink: str

    @property
    def healthy(self) -> Subject:
        """A machine that serves a trunk and is also a SuperNode, with nothing wrong."""
        tls = self.folder / "tls"
        config = {"partition-id": 0, "num-partitions": 2}
        paths = ("data-path", "allowed-path", "seal-key", "public-text")
        return Subject(
            superlink=self.superlink,
            trunk=self.trunk,
            tls_ca=str(tls / "ca" / "ca.crt"),
            token=TOKEN,
            token_file=str(self.folder / "token"),
            node_config=config | {key: str(self.folder / key) for key in paths},
            model=str(self.folder / "model"),
            split="1/2/1",
            state_dir=str(self.folder / "state"),
            bind="127.0.0.1:0",
            tls_cert=str(tls / "server.crt"),
            tls_key=str(tls / "server.key"),
            app=str(self.folder / "app"),
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("place")
    make_model(folder / "model")
    make_model(folder / "twin", seed=1)
    make_model(folder / "wide", width=32)
    wire = certified(folder / "tls")
    for name in ("data-path", "allowed-path", "app/app"):
        (folder / name).mkdir(parents=True)
    for name in ("data-path/a", "data-path/b", "public-text", "app/LICENSE", *APP_FILES):
        (folder / name).write_text("app = 1\n")
    (folder / "app" / "pyproject.toml").write_text(APP)
    (folder / "seal-key").write_bytes(bytes(32))
    (folder / "token").write_text(TOKEN)
    (folder / "token").chmod(0o600)
    served = [Served(name="base", model=str(folder / "model"))]
    with hosted(served, RUN, wire, token=TOKEN) as trunk, superlink_with(wire) as superlink:
        yield Place(folder=folder, trunk=trunk, superlink=superlink)


@contextmanager
def superlink_with(wire: WireSpec, host: str = "127.0.0.1") -> Iterator[str]:
    """Flower's API of a SuperLink in this process, with the certificate of a wire, if any."""
    tls = dict(ssl_certfile=wire.tls_cert or None, ssl_keyfile=wire.tls_key or None)
    options = dict(log_level="error", ws="none", lifespan="off")
    server = uvicorn.Server(uvicorn.Config(create_app(), host, 0, **tls, **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"{host}:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def here() -> Machine:
    """This machine as it would be without other programs, in the versions that are tested."""
    ours = Machine.here()
    return replace(
        ours,
        installed=ours.installed | versions_tested(),
        environment=ON,
        flower=[],
        free_memory=lambda device: 8 << 30,
        free_disk=lambda folder: 8 << 30,
    )


def test_a_healthy_machine_passes_every_check(place, here):
    results = list(examine(place.healthy, here))
    assert [each for each in results if each.state is not State.OK or each.do] == []
    assert len({each.name for each in results}) == len(results) >= 35


# --- faults --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a fault is made of: the place, this machine, a folder, and what ends with the test."""

    place: Place
    here: Machine
    tmp: Path
    stack: ExitStack

    def with_machine(self, subject: Subject, **changes: Any) -> "Asked":
        """A subject on a machine with these changes."""
        return subject, replace(self.here, **changes)

    def superlink(self, **changes: Any) -> Subject:
        """The place's SuperLink alone."""
        return self.only("superlink", "tls_ca", **changes)

    def trunk(self, **changes: Any) -> Subject:
        """The place's trunk alone."""
        return self.only("trunk", "tls_ca", "token", **changes)

    def only(self, *names: str, **changes: Any) -> Subject:
        """These fields of the healthy subject, and changes."""
        fields = {name: getattr(self.place.healthy, name) for name in names}
        return Subject(**{"node_config": {}, **fields, **changes})

    def other(self, **options: Any) -> WireSpec:
        """The files of another authority and its server."""
        return certified(self.tmp / "other", **options)

    def superlink_of(self, wire: WireSpec, **options: Any) -> Subject:
        """A SuperLink with the certificate of a wire."""
        address = self.stack.enter_context(superlink_with(wire, **options))
        return Subject(node_config={}, superlink=address, tls_ca=wire.tls_ca)

    def trunk_of(self, wire: WireSpec) -> Subject:
        """A trunk's server with the certificate of a wire."""
        address = self.stack.enter_context(serving(EchoService(), wire))
        return Subject(node_config={}, trunk=address, tls_ca=wire.tls_ca)

    def trunk_with_adapter(self) -> Subject:
        """A trunk with an adapter on the place's model."""
        parts, adapter = split_model(self.place.healthy.model, "1/2/1"), self.tmp / "adapter"
        for part in (parts.client, parts.trunk):
            add_adapters(part, LoraSpec(enabled=True, targets="q_proj"))
        save_adapter(parts.client, parts.trunk, adapter)
        served = [Served(name="base", model=self.place.healthy.model, adapter=str(adapter))]
        address = self.stack.enter_context(hosted(served, RUN, WireSpec(bind="127.0.0.1:0")))
        return self.only("model", trunk=address)

    def file(self, name: str, content: str | bytes, mode: int = 0o600) -> str:
        """A new file."""
        path = self.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(mode)
        return str(path)

    def folder_with(self, name: str, content: str) -> str:
        """The folder of a new file."""
        return str(Path(self.file(name, content)).parent)

    def node(self, **config: Any) -> Subject:
        """A SuperNode with this config; keys have underscores."""
        named = {key.replace("_", "-"): value for key, value in config.items()}
        return Subject(node_config={"partition-id": 0, "num-partitions": 2, **named})

    def app(self, files: Mapping[str, str]) -> Subject:
        """The place's app with more files."""
        folder = self.tmp / "app"
        shutil.copytree(self.place.folder / "app", folder)
        for name, text in files.items():
            self.file(f"app/{name}", text)
        return Subject(node_config={}, app=str(folder))

    def full(self) -> Subject:
        """A port that accepts no connection, as one behind a firewall that drops packets."""
        listening = self.stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(2):
            waiting = self.stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        return Subject(node_config={}, trunk=f"127.0.0.1:{listening.getsockname()[1]}")

    def taken(self) -> Subject:
        """A port at which another program listens."""
        listening = self.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        return Subject(node_config={}, bind=f"127.0.0.1:{listening.getsockname()[1]}")

    def own(self, wire: WireSpec, **changes: Any) -> Subject:
        """A server with the files of a wire."""
        files = {name: getattr(wire, name) for name in ("tls_cert", "tls_key", "tls_ca")}
        return Subject(**{"node_config": {}, **files, **changes})

    def without_loopback(self) -> Subject:
        """A server whose certificate has its public name alone."""
        wire, key = self.other(), pem.read_key(self.tmp / "other" / "server.key")
        names = x509.SubjectAlternativeName([x509.DNSName("server.example.org")])
        request = x509.CertificateSigningRequestBuilder(pem.common_name("server"))
        asked = request.add_extension(names, critical=False).sign(key, hashes.SHA256())
        signed = Authority.read(self.tmp / "other" / "ca").sign(asked, days=90, now=NOW)
        pem.write(Path(wire.tls_cert), signed)
        return self.own(wire)

    def authority(self, days: int, age: int) -> Subject:
        """An authority that was made `age` days ago for `days` days."""
        Authority.create(self.tmp, name="old", days=days, now=NOW - age * DAY)
        return Subject(node_config={}, tls_ca=str(self.tmp / "ca.crt"))


Asked = tuple[Subject, Machine]
Fault = Callable[[Scene], Subject | Asked]
NOBODY = Subject(node_config={})
EXPIRED = dict(now=NOW - 2 * DAY, days=1)
SUPERLINK = FlowerProcess(pid=7, program="flower-superlink", installs=True)
FAIL, WARN = State.FAIL, State.WARN


def changed(versions: Mapping[str, str], **changes: str) -> dict[str, str]:
    """Installed versions with changes."""
    return {**versions, **changes}


def without(versions: Mapping[str, str], name: str) -> dict[str, str]:
    """Installed versions without those of a package."""
    return {each: version for each, version in versions.items() if each != name}


# The check that finds the fault, its state, what it says, and the fault.
FAULTS: list[tuple[str, State, str, Fault]] = [
    ("python", FAIL, "3.9.1 is not >=3.11", lambda s: s.with_machine(NOBODY, python="3.9.1")),
    (
        "packages",
        FAIL,
        "peft is not installed",
        lambda s: s.with_machine(NOBODY, installed=without(s.here.installed, "peft")),
    ),
    (
        "packages",
        FAIL,
        "transformers 4.9 is not >=5.12",
        lambda s: s.with_machine(NOBODY, installed=changed(s.here.installed, transformers="4.9")),
    ),
    (
        "tested versions",
        WARN,
        r"torch 99.0 \(tested: 2.13.0\)",
        lambda s: s.with_machine(NOBODY, installed=changed(s.here.installed, torch="99.0")),
    ),
    (
        "trunk versions",
        FAIL,
        "fedsplit is 0.0.9 here and .* at the server",
        lambda s: s.with_machine(s.trunk(), installed=changed(s.here.installed, fedsplit="0.0.9")),
    ),
    (
        "trunk versions",
        WARN,
        "torch is 99.0 here and .* at the server",
        lambda s: s.with_machine(s.trunk(), installed=changed(s.here.installed, torch="99.0")),
    ),
    (
        "superlink versions",
        FAIL,
        "Flower is 1.40.0 here and 1.41.0 at the SuperLink",
        lambda s: s.with_machine(s.superlink(), installed=changed(s.here.installed, flwr="1.40.0")),
    ),
    (
        "runtime installation",
        FAIL,
        r"flower-superlink \(7\) installs the dependencies",
        lambda s: s.with_machine(NOBODY, flower=[SUPERLINK]),
    ),
    (
        "runtime installation",
        WARN,
        f"{SWITCH} is not 1",
        lambda s: s.with_machine(s.only("app"), environment={}),
    ),
    ("authority", FAIL, "none cannot be read", lambda s: s.only(tls_ca="none")),
    ("authority", FAIL, "no certificate that", lambda s: s.only(tls_ca=s.file("ca", "x"))),
    (
        "authority",
        FAIL,
        "the certificate of a server and not of an authority",
        lambda s: s.only(tls_ca=s.place.healthy.tls_cert),
    ),
    ("authority", FAIL, "it expired at", lambda s: s.authority(days=5, age=10)),
    ("authority", WARN, "it expires at", lambda s: s.authority(days=20, age=10)),
    ("authority", FAIL, "it is valid from", lambda s: s.authority(days=9, age=-2)),
    (
        "own certificate",
        FAIL,
        "are not a certificate and its key",
        lambda s: s.only("tls_cert", tls_key=s.other().tls_key),
    ),
    ("own certificate", FAIL, "it expired at", lambda s: s.own(s.other(**EXPIRED))),
    ("own certificate", WARN, "it expires at", lambda s: s.own(s.other(days=9))),
    (
        "own certificate chain",
        FAIL,
        "it is of CN=other and not of the authority",
        lambda s: s.own(s.other(), tls_ca=s.place.healthy.tls_ca),
    ),
    ("own certificate name", WARN, "without 127.0.0.1", lambda s: s.without_loopback()),
    (
        "own key",
        WARN,
        r"can be read by other users \(mode 644\)",
        lambda s: s.only(
            "tls_cert", tls_key=s.file("k", Path(s.place.healthy.tls_key).read_bytes(), 0o644)
        ),
    ),
    ("listening port", WARN, "Address already in use", lambda s: s.taken()),
    ("listening port", FAIL, "cannot be listened on", lambda s: s.only(bind="192.0.2.1:9500")),
    ("listening port", FAIL, "is not host:port", lambda s: s.only(bind="9500")),
    ("superlink port", FAIL, "refused", lambda s: s.only(superlink="127.0.0.1:1")),
    ("superlink port", FAIL, "finds no address", lambda s: s.only(superlink="a.invalid:1")),
    ("superlink port", FAIL, "is not host:port", lambda s: s.only(superlink="127.0.0.1")),
    ("superlink port", FAIL, "does not exist", lambda s: s.only(superlink="127.0.0.1:70000")),
    (
        "superlink certificate chain",
        FAIL,
        "of CN=tls, is not of the authority of --tls-ca",
        lambda s: s.superlink(tls_ca=s.other().tls_ca),
    ),
    (
        "superlink certificate chain",
        FAIL,
        "no TLS handshake",
        lambda s: replace(s.superlink_of(WireSpec()), tls_ca=s.place.healthy.tls_ca),
    ),
    (
        "superlink certificate name",
        FAIL,
        r"server.example.org, .*, but the server is called 127.0.0.2",
        lambda s: s.superlink_of(s.other(), host="127.0.0.2"),
    ),
    (
        "superlink certificate expiry",
        FAIL,
        "it expired at",
        lambda s: s.superlink_of(s.other(**EXPIRED)),
    ),
    (
        "superlink certificate expiry",
        FAIL,
        "it is valid from",
        lambda s: s.superlink_of(s.other(now=NOW + DAY)),
    ),
    (
        "superlink certificate expiry",
        WARN,
        "it expires at",
        lambda s: s.superlink_of(s.other(days=9)),
    ),
    ("superlink answer", FAIL, ".", lambda s: s.superlink(superlink=s.place.trunk)),
    ("superlink answer", FAIL, "closed connection", lambda s: s.superlink(tls_ca="")),
    (
        "superlink clock",
        FAIL,
        "1[12]. s behind",
        lambda s: s.with_machine(s.superlink(), now=lambda: time.time() + 120),
    ),
    (
        "superlink clock",
        WARN,
        "clock is .* s ahead",
        lambda s: s.with_machine(s.superlink(), now=lambda: time.time() - 20),
    ),
    ("trunk port", FAIL, "refused", lambda s: s.only(trunk="127.0.0.1:1")),
    ("trunk port", FAIL, "No such file", lambda s: s.only(trunk=f"unix:{s.tmp}/none")),
    ("trunk port", FAIL, "did not answer within 0.1 s", lambda s: s.full()),
    (
        "trunk certificate chain",
        FAIL,
        "of CN=tls, is not of the authority of --tls-ca",
        lambda s: s.trunk(tls_ca=s.other().tls_ca),
    ),
    (
        "trunk certificate name",
        FAIL,
        "but the server is called 127.0.0.2",
        lambda s: s.trunk_of(s.other(address="127.0.0.2:0")),
    ),
    ("trunk certificate expiry", FAIL, "it expired at", lambda s: s.trunk_of(s.other(**EXPIRED))),
    ("trunk answer", FAIL, "answer", lambda s: s.trunk(trunk=s.place.superlink)),
    ("trunk answer", FAIL, "both sides agree on TLS", lambda s: s.trunk(tls_ca="")),
    (
        "trunk clock",
        FAIL,
        "1[12]. s behind",
        lambda s: s.with_machine(s.trunk(), now=lambda: time.time() + 120),
    ),
    ("token", FAIL, "does not accept it", lambda s: s.trunk(token="guess")),
    ("token", WARN, "none was given", lambda s: s.trunk(token="")),
    ("token", FAIL, "is empty", lambda s: s.trunk(token_error="the file is empty")),
    ("token file", WARN, "mode 644", lambda s: s.trunk(token_file=s.file("t", TOKEN, 0o644))),
    ("token file", FAIL, "cannot be read", lambda s: s.trunk(token_file="none")),
    ("model", FAIL, "there is no such directory", lambda s: s.only(model="/none")),
    ("model", FAIL, "trunk needs at least", lambda s: s.only("model", split="3/*/3")),
    (
        "model",
        FAIL,
        "no model.safetensors",
        lambda s: s.only(
            model=str(
                Path(
                    s.file("m/config.json", (s.place.folder / "model/config.json").read_bytes())
                ).parent
            )
        ),
    ),
    (
        "fingerprint",
        FAIL,
        "base: the weights differ",
        lambda s: s.trunk(model=str(s.place.folder / "twin")),
    ),
    (
        "fingerprint",
        FAIL,
        "base: .* hidden_size is 32 at the client",
        lambda s: s.trunk(model=str(s.place.folder / "wide")),
    ),
    (
        "fingerprint",
        FAIL,
        "base: a llama with other settings or cut",
        lambda s: s.trunk(model=str(s.place.folder / "wide"), token=""),
    ),
    (
        "fingerprint",
        WARN,
        r"base: the trunk has an adapter \(.*\) and the client has none",
        lambda s: s.trunk_with_adapter(),
    ),
    ("device", FAIL, "cuda:7 cannot be used", lambda s: s.only(device="cuda:7")),
    ("device", FAIL, "quantum cannot be used", lambda s: s.only(device="quantum")),
    (
        "memory",
        FAIL,
        "of weights, and cpu 0.0 MiB free",
        lambda s: s.with_machine(s.only("model", "split"), free_memory=lambda device: 1000),
    ),
    (
        "memory",
        WARN,
        "to train all of them takes",
        lambda s: s.with_machine(s.only("model", "split"), free_memory=lambda device: 60000),
    ),
    ("state-dir", FAIL, "cannot be written", lambda s: s.only(state_dir=s.file("f", "") + "/d")),
    (
        "disk",
        FAIL,
        "has 0.0 MiB free; two checkpoints take 1,024.0 MiB",
        lambda s: s.with_machine(s.only("state_dir"), free_disk=lambda folder: 1000),
    ),
    (
        "node config",
        FAIL,
        "there is no datapath; did you mean data-path",
        lambda s: s.node(datapath="/srv"),
    ),
    (
        "node config",
        FAIL,
        "state-dir=state is not an absolute",
        lambda s: s.node(state_dir="state"),
    ),
    ("node config", FAIL, "partition-id=2 is not one of", lambda s: s.node(partition_id=2)),
    (
        "node config",
        FAIL,
        "it has neither partition-id nor data-path",
        lambda s: Subject(node_config={"device": "cpu"}),
    ),
    ("data-path", FAIL, "data-path=/none does not exist", lambda s: s.node(data_path="/none")),
    ("data-path", FAIL, "is not UTF-8", lambda s: s.node(data_path=s.file("b", b"\xff\xfe"))),
    ("data-path", FAIL, "has no text", lambda s: s.node(data_path=str(s.tmp))),
    ("data-path", FAIL, "has one line", lambda s: s.node(data_path=s.file("d", "a line\n"))),
    ("data-path", FAIL, "has one file", lambda s: s.node(data_path=s.folder_with("d/a", "b\nc"))),
    ("allowed-path", FAIL, "is not a folder", lambda s: s.node(allowed_path="/none")),
    ("seal-key", FAIL, "cannot be read", lambda s: s.node(seal_key="/none")),
    ("seal-key", FAIL, "32 bytes, but", lambda s: s.node(seal_key=s.file("k", "short"))),
    ("public-text", FAIL, "does not exist", lambda s: s.node(public_text="/none")),
    ("app files", FAIL, "Flower refused the app", lambda s: s.only(app=str(s.tmp))),
    ("app files", FAIL, "lacks app/client.py", lambda s: s.app({".gitignore": "client.py"})),
    (
        "app files",
        FAIL,
        "lacks conf/config.yaml",
        lambda s: s.app({"fedsplit/__init__.py": "x = 1"}),
    ),
    ("app files", FAIL, "FAB size exceeds", lambda s: s.app({"large.py": "#" * (11 << 20)})),
    ("app data", WARN, "has data/a.jsonl, and every", lambda s: s.app({"data/a.jsonl": "{}"})),
    ("app data", WARN, "has run.toml, and every", lambda s: s.app({"run.toml": "a = 1"})),
]


@pytest.mark.parametrize(
    ("check", "state", "text", "fault"), FAULTS, ids=[f"{f[0]}: {f[2]}" for f in FAULTS]
)
def test_a_fault_is_found_by_its_check(
    check, state, text, fault, place, here, tmp_path, monkeypatch
):
    if "within" in text:
        monkeypatch.setattr("fedsplit.doctor.network.TIMEOUT_S", 0.1)
    with ExitStack() as stack:
        made = fault(Scene(place=place, here=here, tmp=tmp_path, stack=stack))
        subject, machine = made if isinstance(made, tuple) else (made, here)
        found = {each.name: each for each in examine(subject, machine)}
    assert found[check].state is state, found[check]
    assert re.search(text, found[check].what) and found[check].do


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"data-path": "/srv"}, "the server gives it a number"),
        ({"partition-id": 3}, "client 3"),
        ({"partition-id": 3, "num-partitions": 4, "data-path": "/srv"}, "client 3 of 4"),
    ],
)
def test_a_config_that_gives_a_place_among_the_clients_is_right(config, text):
    found = check_node_config(config)
    assert (found.state, found.what) == (State.OK, text)


def test_without_the_authority_no_server_is_blamed(place, here, tmp_path):
    subject = Subject(node_config={}, trunk=place.trunk, tls_ca=str(tmp_path / "none"))
    found = {each.name: each for each in examine(subject, here)}
    assert [name for name, each in found.items() if each.state is FAIL] == ["authority"]
    assert found["trunk certificate"].what == "the authority has to be right first"


def test_a_node_config_that_sets_nothing_is_refused(capsys):
    assert main(["doctor", "--node-config", "data-path"]) == 1
    assert "--node-config data-path sets nothing" in capsys.readouterr().err


def test_every_check_has_a_fault(place, here):
    checks = {each.name for each in examine(place.healthy, here)}
    assert checks == {check for check, *_ in FAULTS} and len(checks) >= 20


def test_a_node_with_its_own_text_needs_no_number():
    assert check_node_config({"data-path": "/srv/text"}).state is State.OK
    assert check_node_config({"state-dir": "/srv/state"}).state is State.FAIL


def test_the_keys_of_a_node_are_those_that_it_reads():
    node = (ROOT / "fedsplit" / "flower" / "node.py").read_text(encoding="utf-8")
    read = set(re.findall(r'settings\.get\("([\w-]+)"', node))
    assert read | set(PRIVACY_KEYS.values()) == set(NODE_CONFIG)


OFF, ALLOW = "--disable-runtime-dependency-installation", "--allow-runtime-dependency-installation"


@pytest.mark.parametrize(
    ("program", "words", "environment", "does"),
    [
        ("flower-superlink", [], {}, True),
        ("flower-superlink", [], ON, False),
        ("flower-superlink", [OFF], {}, False),
        ("flower-superlink", [ALLOW], ON, True),
        ("flower-supernode", [], {}, False),
        ("flower-supernode", [ALLOW], {}, True),
    ],
)
def test_who_installs_dependencies(program, words, environment, does):
    assert installs(program, words, environment) is does


def test_processes_of_flower_are_found(tmp_path):
    # It installs nothing, so that a doctor of another test finds nothing wrong.
    program = tmp_path / "flower-superlink"
    program.write_text("import time; print(flush=True); time.sleep(60)")
    command = [sys.executable, str(program), OFF]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        found = Machine.here().flower
        process.kill()
    expected = FlowerProcess(pid=process.pid, program="flower-superlink", installs=False)
    assert expected in found


def test_a_stranger_learns_neither_versions_nor_the_clock(place):
    asked = (
        ask_trunk(place.trunk, place.healthy.tls_ca, token, time.time) for token in (TOKEN, "")
    )
    known, stranger = (answer.info for answer in asked)
    assert "fedsplit" in known.versions and known.time_s > 0
    assert (stranger.versions, stranger.time_s, stranger.budgets) == ({}, 0.0, {})


# --- the command ---------------------------------------------------------------------------------


def options_of(subject: Subject) -> list[str]:
    """The command line of a subject."""
    words = ["doctor", "--node-config", node_config_text(subject)]
    for name in ("superlink", "trunk", "tls_ca", "token_file", "model", "split", "tls_cert"):
        words += [f"--{name.replace('_', '-')}", getattr(subject, name)]
    return [*words, "--tls-key", subject.tls_key]


def node_config_text(subject: Subject) -> str:
    """A node's config as `flower-supernode` takes it."""
    config = {**subject.node_config, "state-dir": subject.state_dir}
    return " ".join(f"{k}={json.dumps(v)}" for k, v in config.items())


def test_the_command_prints_a_table_and_exits_with_0(place, capsys):
    assert main(options_of(place.healthy)) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert re.search(
        r"^ok +fingerprint +the trunk base is of this model and weights$", printed, re.M
    )
    assert re.search(r"^ok +state-dir +.*/state can be written$", printed, re.M)
    assert re.search(r"^skipped +app +no --app was given$", printed, re.M)


def test_a_failed_check_says_what_to_do_and_exits_with_1(place, tmp_path, capsys):
    wrong = replace(place.healthy, superlink="127.0.0.1:1", token_file=str(tmp_path / "none"))
    assert main([*options_of(wrong), "--json"]) == 1
    printed, error = capsys.readouterr()
    found = {each["name"]: each for each in json.loads(printed)}
    failed = {name for name, each in found.items() if each["state"] == "fail"}
    assert failed == {"superlink port", "token", "token file"}
    assert (
        found["token"]["what"] == f"--token-file {tmp_path}/none cannot be read: No such file "
        "or directory"
    )
    assert found["superlink port"]["do"].startswith("start the server")
    count = len(found)
    assert error == f"error: 3 of {count} checks failed: superlink port, token, token file\n"
    assert main(options_of(wrong)) == 1
    table = capsys.readouterr().out
    assert re.search(
        r"^FAIL +superlink port +127.0.0.1:1: Connection refused\n +-> start", table, re.M
    )


def test_a_text_names_options_and_not_fields(place, capsys):
    assert main(["doctor", "--tls-cert", "none.crt", "--tls-key", "none.key"]) == 1
    assert "--tls-key=none.key cannot be read" in capsys.readouterr().out
