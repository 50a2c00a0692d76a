"""What a doctor is asked to check, and the machine that it does so on."""

import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import psutil
import torch
from packaging.utils import canonicalize_name

from fedsplit.errors import ConfigError
from fedsplit.model.placement import devices_of

NodeConfig = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is checked. Checks of what is empty are skipped.

    Attributes:
        superlink: The SuperLink's host and port.
        trunk: The trunk's address.
        tls_ca: The file of the authority that both servers' certificates are of.
        token: The trunk's token.
        token_file: The file that it was read from.
        token_error: Why it could not be read.
        node_config: The config of a SuperNode.
        model: The directory or hub id of the whole model.
        revision: The revision of a hub id.
        split: The blocks of bottom, trunk and top.
        device: The torch device, as of a trunk.
        state_dir: The folder of the state.
        bind: The address at which this machine serves a trunk; empty at a client.
        tls_cert: The server's certificate.
        tls_key: Its key.
        app: The folder of the Flower app.
    """

    superlink: str = ""
    trunk: str = ""
    tls_ca: str = ""
    token: str = ""
    token_file: str = ""
    token_error: str = ""
    node_config: NodeConfig
    model: str = ""
    revision: str = "main"
    split: str = ""
    device: str = "cpu"
    state_dir: str = ""
    bind: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    app: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowerProcess:
    """A process of Flower on this machine.

    Attributes:
        pid: Its process id.
        program: `flower-superlink` or `flower-supernode`.
        installs: Whether it installs the dependencies of apps.
    """

    pid: int
    program: str
    installs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What checks read of a machine.

    Attributes:
        python: The version of Python.
        installed: The version of each installed distribution, by its normalized name.
        environment: The environment variables.
        flower: The running processes of Flower.
        free_memory: Returns the free bytes of a device, as of `Subject.device`.
        free_disk: Returns the free bytes of a folder's disk.
        now: Returns the time, in seconds since the epoch.
    """

    python: str
    installed: Mapping[str, str]
    environment: Mapping[str, str]
    flower: Sequence[FlowerProcess]
    free_memory: Callable[[str], int]
    free_disk: Callable[[Path], int]
    now: Callable[[], float]

    @staticmethod
    def here() -> "Machine":
        """Return this machine."""
        named = [(each.name, each.version) for each in distributions()]
        return Machine(
            python=platform.python_version(),
            # The first one on the path is imported.
            installed={canonicalize_name(name): found for name, found in reversed(named)},
            environment=dict(os.environ),
            flower=_flower_processes(),
            free_memory=_free_memory,
            free_disk=lambda folder: shutil.disk_usage(folder).free,
            now=time.time,
        )


def _flower_processes() -> list[FlowerProcess]:
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            names = {Path(word).name for word in words[:2]}
            if program := next(iter(names & {"flower-superlink", "flower-supernode"}), ""):
                does = installs(program, words, process.environ())
                found.append(FlowerProcess(pid=process.pid, program=program, installs=does))
        # It has ended, or is another user's.
        except psutil.Error:
            continue
    return found


SWITCH = "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"
"""The variable that is "1" where a SuperLink should not install dependencies."""


def installs(program: str, words: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Return whether a process of Flower installs the dependencies of apps.

    Args:
        program: `flower-superlink` or `flower-supernode`.
        words: Its command line.
        environment: Its environment variables.
    """
    allowed = "--allow-runtime-dependency-installation" in words
    if program == "flower-supernode":
        return allowed
    disabled = "--disable-runtime-dependency-installation" in words
    return allowed or not (disabled or environment.get(SWITCH) == "1")


def _free_memory(device: str) -> int:
    devices = devices_of(device)
    if not devices[0].startswith("cuda"):
        return int(psutil.virtual_memory().available)
    try:
        return sum(torch.cuda.mem_get_info(each)[0] for each in devices)
    except (RuntimeError, AssertionError, ValueError) as exc:
        raise ConfigError(f"device={device} cannot be used: {exc}") from exc
