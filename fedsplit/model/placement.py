"""Placement of a trunk on one device, or of its blocks on several.

Each device gets consecutive blocks. The first device also gets all other modules, the smashed data
and the trunk's output. A hook of accelerate moves the arguments of a block to the block's device,
as with the `device_map` of transformers.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from accelerate.hooks import (
    AlignDevicesHook,
    add_hook_to_module,
    remove_hook_from_submodules,
)
from accelerate.utils import named_module_tensors, set_module_tensor_to_device
from torch import nn

from fedsplit.errors import ConfigError
from fedsplit.model.stage import TrunkPart

M = TypeVar("M", bound=nn.Module)


def devices_of(device: str) -> list[str]:
    """The devices that a setting names: one, several with commas, or `auto` for all GPUs.

    Without a GPU, `auto` is the CPU.

    Raises:
        ConfigError: The devices are of several kinds.

    >>> devices_of("cuda:0,cuda:1")
    ['cuda:0', 'cuda:1']
    """
    if device == "auto":
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    devices = [name.strip() for name in device.split(",")]
    if len({name.partition(":")[0] for name in devices}) > 1:
        raise ConfigError(
            f"device={device} names devices of several kinds; a trunk lies on those of one kind, "
            "such as cuda:0,cuda:1"
        )
    return devices


def placed(trunk: TrunkPart, device: str) -> TrunkPart:
    """The trunk, moved to the devices that `device` names.

    Args:
        trunk: The trunk with its adapters; changed in place.
        device: As in `devices_of`. Several devices get about the same number of bytes each.

    Raises:
        ConfigError: torch does not find a device, or there are more devices than blocks.
    """
    held, devices = trunk.held_blocks, devices_of(device)
    if device == "auto":
        devices = devices[: len(held)]
    # Hooks of an earlier placement would move arguments to the earlier devices.
    remove_hook_from_submodules(trunk)
    if len(devices) == 1:
        return on_device(trunk, devices[0])
    if len(devices) > len(held):
        raise ConfigError(
            f"device={device} names {len(devices)} devices, but the trunk has {len(held)} blocks; "
            "name fewer, or cut so that it has more (split)"
        )
    blocks: Any = trunk.get_submodule(trunk.plan.blocks)
    runs = _runs([_num_bytes(blocks[i]) for i in held], len(devices))
    for index, run in zip(held, runs, strict=True):
        block = on_device(blocks[index], devices[run])
        # The hook does not move the KV cache: each of its layers is on its block's device.
        hook = AlignDevicesHook(devices[run], skip_keys=trunk._skip_keys_device_placement)
        add_hook_to_module(block, hook)
    for name, _ in named_module_tensors(trunk, recurse=True):
        if not name.startswith(f"{trunk.plan.blocks}."):
            set_module_tensor_to_device(trunk, name, devices[0])
    return trunk


def on_device(module: M, device: str) -> M:
    """The module, moved to one device.

    Raises:
        ConfigError: torch does not find the device.
    """
    try:
        return module.to(device)
    except (RuntimeError, AssertionError) as exc:
        # torch built without CUDA asserts; an unknown or missing device is a RuntimeError.
        raise ConfigError(f"device={device} cannot be used: {str(exc).splitlines()[0]}") from exc


def _num_bytes(block: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in block.parameters())


def _runs(sizes: Sequence[int], count: int) -> list[int]:
    """The index of each block's device, by the position of the block's middle byte among all."""
    # The middle, so that a block across a boundary goes to the device that has more of it.
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [int((end - size / 2) * count / ends[-1]) for end, size in zip(ends, sizes, strict=True)]
