"""The image of `deploy/Dockerfile`: buildah makes it, and a trunk server runs in it without rights.

Where no registry of images answers, its base is made of Debian's packages.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from tests.edge.certified import certified
from tests.edge.deploying import DOCKERFILE, composed, replaced
from tests.edge.processes import free_ports
from tests.edge.tiny_models import make_model
from tests.house.source import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("buildah") or os.geteuid() != 0,
        reason="no buildah, or no root to run it: apt-get install buildah mmdebstrap",
    ),
]
IMAGE = "localhost/fedsplit"
PULL_S = 300.0
DRAIN_S = 30.0
WITHOUT_RIGHTS = (
    'mount -o remount,ro,bind / && user="$1" && shift && exec setpriv --reuid="$user" '
    '--regid="$user" --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all -- "$@"'
)
"""Runs a command as a user on a read-only root, as a container engine would."""


class Images:
    """Images and containers of buildah in a folder of their own.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self._store = (f"--root={folder}/root", f"--runroot={folder}/runroot")

    def __call__(self, *words: str) -> str:
        """What a command of buildah prints."""
        done = subprocess.run(self.command(*words), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout.strip()

    def command(self, *words: str) -> list[str]:
        """The command line of a command of buildah."""
        return ["buildah", *self._store, *words]

    def close(self) -> None:
        """Remove them all: they are gigabytes."""
        self("rm", "--all")
        self("rmi", "--all", "--force")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    """The image, built as `docker build` does."""
    folder = tmp_path_factory.mktemp("images")
    with closing(Images(folder)) as images:
        images(
            "build",
            "--isolation=chroot",
            "--format=docker",
            f"--build-arg=BASE={base_of(images, folder)}",
            *settings_of_pip(),
            f"--file={DOCKERFILE}",
            f"--tag={IMAGE}",
            str(ROOT),
        )
        yield images


def base_of(images: Images, folder: Path) -> str:
    """The base that the Dockerfile names, or one of Debian's packages."""
    (named,) = re.findall(r"^ARG BASE=(\S+)$", DOCKERFILE.read_text("utf-8"), re.M)
    pull = images.command("pull", named)
    pulled = subprocess.run(pull, capture_output=True, text=True, check=False, timeout=PULL_S)
    if pulled.returncode == 0:
        return named
    reason = f"{named} cannot be pulled ({pulled.stderr.strip().splitlines()[-1]})"
    if not shutil.which("mmdebstrap"):
        pytest.skip(f"{reason}, and without mmdebstrap there is no other base")
    words = ["--variant=minbase", "--include=python3-venv,ca-certificates", "bookworm"]
    made = subprocess.run(
        ["mmdebstrap", *words, str(folder / "base.tar")],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"{reason}, and mmdebstrap made no other base: {made.stderr[-400:]}")
    (folder / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
    images("build", "--tag=localhost/base", str(folder))
    return "localhost/base"


def settings_of_pip() -> list[str]:
    """Volumes with this machine's settings of pip, and with the files that they name."""
    command = [sys.executable, "-m", "pip", "config", "debug"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    paths = {Path(found) for found in re.findall(r"/[^\s',]+", text)}
    # The pages of an index are in `simple`, and its packages beside it.
    paths = {path.parent if path.name == "simple" else path for path in paths if path.exists()}
    return [f"--volume={path}:{path}:ro" for path in sorted(paths)]


class Container:
    """A container of the image, with a read-only root and an empty /tmp.

    Args:
        images: The images.
        volumes: Folders here by their place in the container, which belong to its user.
    """

    def __init__(self, images: Images, volumes: Mapping[str, Path]) -> None:
        described = json.loads(images("inspect", "--type=image", IMAGE))
        self.config = described["Docker"]["config"]
        self._user = self.config["User"].partition(":")[0]
        self._images = images
        self._name = images("from", "--pull-never", IMAGE)
        self._volumes = [f"--volume={folder}:{place}" for place, folder in volumes.items()]
        for folder in volumes.values():
            for path in (folder, *folder.iterdir()):
                os.chown(path, int(self._user), int(self._user))

    def command(self, *words: str) -> list[str]:
        """The command line of a command in the container, as the user of the image."""
        isolation = ["--isolation=chroot", "--user=0", "--cap-add=CAP_SYS_ADMIN"]
        isolation += ["--mount=type=tmpfs,destination=/tmp", *self._volumes]
        words = ("sh", "-c", WITHOUT_RIGHTS, "sh", self._user, *words)
        return self._images.command("run", *isolation, self._name, "--", *words)

    def process_of(self, server: "subprocess.Popen[str]") -> psutil.Process:
        """The process in the container, of a command that runs: buildah passes no signals on."""
        (found,) = (
            process
            for process in psutil.Process(server.pid).children(recursive=True)
            if process.uids().effective == int(self._user)
        )
        return found

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """Run a command in the container."""
        return subprocess.run(self.command(*words), capture_output=True, text=True, check=False)


def test_a_trunk_server_in_the_image_needs_no_rights_and_answers_its_health_check(images, tmp_path):
    for name in ("model", "secrets", "state"):
        (tmp_path / name).mkdir()
    make_model(tmp_path / "model")
    wire = certified(tmp_path / "tls")
    for name, file in {
        "ca.crt": wire.tls_ca,
        "server.crt": wire.tls_cert,
        "server.key": wire.tls_key,
    }.items():
        shutil.copy(file, tmp_path / "secrets" / name)
    (tmp_path / "secrets" / "token").write_text("secret")
    places = {"/model": "model", "/etc/fedsplit": "secrets", "/state": "state"}
    container = Container(images, {at: tmp_path / name for at, name in places.items()})
    trunk, metrics = free_ports(2)
    ports = {":9500": f":{trunk}", ":9600": f":{metrics}"}
    serve = [replaced(word, ports) for word in container.config["Cmd"]]
    kind, *check = (replaced(word, ports) for word in container.config["Healthcheck"]["Test"])
    assert kind == "CMD"
    with subprocess.Popen(container.command(*serve), stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout.readline().startswith("serving model")
            answer = container.run(*check)
            assert "fingerprint of model and cut" in answer.stdout, answer.stderr
            container.process_of(server).terminate()
            assert server.wait(DRAIN_S) == 0
        finally:
            server.kill()
    written = container.run("sh", "-c", "id -u; touch /opt/fedsplit/x /etc/x /state/x")
    assert written.stdout.strip() == "10001"
    assert written.stderr.count("Read-only file system") == 2
    assert {each.name for each in (tmp_path / "state").iterdir()} >= {"x"}
    commands = {each["command"][0] for each in composed().values() if each["image"] == "fedsplit"}
    for command in commands:
        assert container.run(command, "--version").returncode == 0, command
