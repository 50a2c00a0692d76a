"""Two devices that are none: their tensors say where they are, and hold real numbers on the CPU.

Importing this makes `pretend:0` and `pretend:1` devices of torch, for the rest of the process.
An operation on tensors of both is refused as torch refuses it for two GPUs, in forwards and in
backwards; otherwise it is what it is on the CPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class There(Tensor):
    """A tensor on a pretended device; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> "There":
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=device
        )
        made.held = held
        return made

    def untyped_storage(self) -> torch.UntypedStorage:
        """Where the numbers are."""
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(operation, *args, **(kwargs or {}))


class MixedDevices(RuntimeError):
    """An operation was given tensors of several devices."""


def _run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute on the CPU; what comes out is where the operation was asked to be or its inputs."""
    given: list[Tensor] = []

    def held(tensor: Tensor) -> Tensor:
        given.append(tensor)
        return tensor.held if isinstance(tensor, There) else tensor

    args = _with_tensors(held, args)
    kwargs = {name: _with_tensors(held, value) for name, value in kwargs.items()}
    # Numbers without a dimension may come from the CPU, as for GPUs.
    places = {each.device for each in given if each.ndim or each.device.type != "cpu"}
    if operation in _COPIES:
        places = {given[0].device}
    elif len(places) > 1:
        raise MixedDevices(f"{operation} on {' and '.join(sorted(map(str, places)))}")
    if kwargs.get("device") is not None:
        places = {torch.device(kwargs["device"])}
        kwargs["device"] = "cpu"
    out = operation(*args, **kwargs)
    place = next(iter(places), torch.device("cpu"))
    if place.type != NAME:
        return out
    changed = {id(each.held): each for each in given if isinstance(each, There)}
    return _with_tensors(
        lambda found: changed[id(found)] if id(found) in changed else There(found, place), out
    )


def _with_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a value of an operation's, with another tensor for each in it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_with_tensors(change, each) for each in value)
    return value


class _Module:
    """What stands at `torch.pretend`: two devices, whose random numbers are the CPU's."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 2

    def current_device(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None:
        """Nothing of its own."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    class device:  # noqa: N801
        """A block on one of them."""

        def __init__(self, index: Any) -> None:
            """Nothing to remember."""

        def __enter__(self) -> None:
            """Nothing to choose."""

        def __exit__(self, *_: object) -> None:
            """Nothing to undo."""


class Pretending(TorchDispatchMode):
    """A block in which this thread can make tensors on the pretended devices, and compute."""

    def __enter__(self) -> "Pretending":
        # As torch's own FakeTensorMode has it: `torch.tensor` begins on the CPU ...
        torch._C._set_only_lift_cpu_tensors(True)
        # ... and here a backward runs on this thread: for these devices torch has none of its own.
        torch._C._set_multithreading_enabled(False)
        super().__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        torch._C._set_multithreading_enabled(True)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(operation, *args, **(kwargs or {}))


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
