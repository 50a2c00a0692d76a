"""Checks of the machine: device, memory, disk, the state folder, and Flower's processes."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from fedsplit.doctor.result import Result, fail, ok, skipped, warn
from fedsplit.doctor.subject import SWITCH, FlowerProcess
from fedsplit.errors import ConfigError
from fedsplit.model.placement import devices_of

TRAINED = 4
"""Weights, gradients and two moments: what AdamW trains all weights of a part with, in weights."""

SAVED = 6
"""Two checkpoints of weights and two moments: the new one is written beside the old one."""

_LEAST_BYTES = 1 << 30


def check_device(device: str) -> Result:
    """Check that torch can compute on a device."""
    try:
        devices = devices_of(device)
        for each in devices:
            torch.empty(1, device=each)
    except (RuntimeError, AssertionError, ValueError, ConfigError) as exc:
        return fail(
            "device",
            f"{device} cannot be used: {(str(exc).splitlines() or [type(exc).__name__])[0]}",
            "name a device that this machine has, such as cpu, or install the driver and a build "
            "of torch for it",
        )
    return ok("device", f"torch computes on {', '.join(devices)}")


def check_memory(part_bytes: int, device: str, free: Callable[[str], int]) -> Result:
    """Check that a part fits into the free memory of its device."""
    if not part_bytes:
        return skipped("memory", "it needs --model and --split")
    try:
        free_bytes = free(device)
    except ConfigError as exc:
        return skipped("memory", str(exc))
    found = f"the part has {mib(part_bytes)} of weights, and {device} {mib(free_bytes)} free"
    if part_bytes > free_bytes:
        return fail(
            "memory",
            found,
            "give this side fewer blocks (--split), end other programs, or use a larger machine",
        )
    if TRAINED * part_bytes > free_bytes:
        return warn(
            "memory",
            f"{found}; to train all of them takes {mib(TRAINED * part_bytes)} and the activations",
            "train with lora=on, or give this side fewer blocks (--split)",
        )
    return ok("memory", found)


def check_disk(state_dir: str, part_bytes: int, free: Callable[[Path], int]) -> Result:
    """Check that checkpoints of a part fit on the disk of the state folder."""
    if not state_dir:
        return skipped("disk", "no state-dir was given")
    needed = max(_LEAST_BYTES, SAVED * part_bytes)
    free_bytes = free(_existing(Path(state_dir)))
    found = f"{state_dir} has {mib(free_bytes)} free; two checkpoints take {mib(needed)}"
    if free_bytes < needed:
        return fail("disk", found, "make room, or name a state-dir on another disk")
    return ok("disk", found)


def check_state_dir(state_dir: str) -> Result:
    """Check that this user can write to the state folder, or make it."""
    if not state_dir:
        return skipped("state-dir", "none was given, so this machine cannot continue a run")
    folder = _existing(Path(state_dir))
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ok("state-dir", f"{state_dir} can be written")
    except OSError as exc:
        return fail(
            "state-dir",
            f"{state_dir} cannot be written: {exc.strerror}",
            "give its folder to the user that runs the process (chown), or name another one",
        )


def check_installation(
    processes: Sequence[FlowerProcess], environment: Mapping[str, str], *, starts: bool
) -> Result:
    """Check that Flower does not install the dependencies of apps when a run begins.

    Args:
        processes: Those of Flower on this machine.
        environment: The variables with which a SuperLink would be started.
        starts: Whether one may be started here.
    """
    name = "runtime installation"
    do = (
        "start flower-superlink with --disable-runtime-dependency-installation, or with "
        f"{SWITCH}=1, and flower-supernode without --allow-runtime-dependency-installation"
    )
    if wrong := [f"{each.program} ({each.pid})" for each in processes if each.installs]:
        found = "installs the dependencies of every app, PyTorch included"
        return fail(name, f"{', '.join(wrong)} {found}", do)
    if processes:
        return ok(name, f"{len(processes)} processes of Flower here install nothing")
    if not starts or environment.get(SWITCH) == "1":
        return ok(name, "no SuperLink that installs dependencies runs here")
    return warn(name, f"{SWITCH} is not 1, and flwr run may start a SuperLink here", do)


def mib(num_bytes: int) -> str:
    """Return a number of bytes as text.

    >>> mib(3 << 19)
    '1.5 MiB'
    """
    return f"{num_bytes / (1 << 20):,.1f} MiB"


def _existing(path: Path) -> Path:
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
