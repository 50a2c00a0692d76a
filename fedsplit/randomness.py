"""One lock for the process-wide state of torch and transformers, and random numbers under it.

torch's default generators belong to the process. Clients that share one (an inline run, a test)
and the trunk's engine beside them would draw from each other's dropout. Building a model belongs
here too: it draws, and transformers, peft and torch's fake tensors replace functions, classes'
methods and the default dtype of the whole process meanwhile. So a thread that draws or builds has
all of that to itself, and releases it while it waits for another process.
"""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_LOCK = threading.Lock()


class _Thread(threading.local):
    """Whether this thread has the lock."""

    holds_lock = False


_THREAD = _Thread()


@contextmanager
def process_state() -> Iterator[None]:
    """A block that no other thread's `process_state` or `rng_scope` overlaps; both may nest.

    Build models in it, but read files and wait for peers outside.
    """
    if _THREAD.holds_lock:
        yield
        return
    with _LOCK:
        _THREAD.holds_lock = True
        try:
            yield
        finally:
            _THREAD.holds_lock = False


@contextmanager
def rng_scope(seed: int | str, *, needed: bool = True) -> Iterator[None]:
    """A block whose random numbers depend on `seed` alone; the generators are restored after it.

    Args:
        seed: A number, or a name that stands for one.
        needed: Whether the block draws at all; if not, it runs as it is and holds up no thread.
    """
    if not needed:
        yield
        return
    every = range(torch.accelerator.device_count())  # without names, torch warns of so many
    with process_state(), torch.random.fork_rng(devices=every):
        torch.manual_seed(seed if isinstance(seed, int) else _number(seed))
        yield


@contextmanager
def rng_released() -> Iterator[None]:
    """A block in which others may draw, though this thread is in an `rng_scope` or not.

    The scope goes on with the random numbers that it would have drawn without the block.
    """
    if not _THREAD.holds_lock:
        yield
        return
    kept = _states()
    _THREAD.holds_lock = False
    _LOCK.release()
    try:
        yield
    finally:
        _LOCK.acquire()
        _THREAD.holds_lock = True
        torch.set_rng_state(kept[0])
        for device, state in enumerate(kept[1:]):
            torch.cuda.set_rng_state(state, device)


def draws(model: PreTrainedModel) -> bool:
    """Whether a training forward of this model draws random numbers, which is: has dropout."""
    layers = (m.p for m in model.modules() if isinstance(m, nn.Dropout))
    # Attention keeps its rate as a number and calls the function.
    rates = (v for m in model.modules() for k, v in vars(m).items() if "drop" in k)
    return any(isinstance(p, float) and p > 0 for p in (*layers, *rates))


def _states() -> list[Tensor]:
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *on_devices]


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
