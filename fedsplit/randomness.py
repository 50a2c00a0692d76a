"""The lock for process-wide state of torch and transformers, and seeded random numbers under it.

torch's default generators belong to the process. Without a lock, the dropout of clients that share
a process (in an inline run or a test) and of the trunk's engine would depend on the order of their
threads. Building a model needs the lock too: it draws random numbers, and transformers, peft and
torch's fake tensors replace functions, methods of classes and the default dtype of the process
meanwhile. A thread holds the lock while it draws or builds, and releases it while it waits for
another process.
"""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_LOCK = threading.Lock()


class _Thread(threading.local):
    """Whether this thread holds the lock."""

    holds_lock = False


_THREAD = _Thread()


@contextmanager
def process_state() -> Iterator[None]:
    """A context that holds the lock; `process_state` and `rng_scope` may nest.

    Build models inside, but read files and wait for peers outside.
    """
    # Not an RLock: `rng_released` has to release the lock at any depth of nesting.
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
    """A context whose random numbers depend on `seed` only; it restores the generators at its end.

    Args:
        seed: A number, or a name from which a number is computed.
        needed: Whether the context draws random numbers; if not, it does not take the lock.
    """
    if not needed:
        yield
        return
    # Named, since torch warns if it has to fork the generators of several devices by default.
    devices = range(torch.accelerator.device_count())
    with process_state(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed if isinstance(seed, int) else _number(seed))
        yield


def rng_released() -> AbstractContextManager[None]:
    """A context in which other threads may draw; it does nothing outside of an `rng_scope`.

    After it, the scope continues with the random numbers that it would have drawn without it.
    """
    return _released() if _THREAD.holds_lock else nullcontext()


@contextmanager
def _released() -> Iterator[None]:
    states = _states()
    # While this thread still holds the lock: afterwards, another thread may change the generators.
    _THREAD.holds_lock = False
    _LOCK.release()
    try:
        yield
    finally:
        _LOCK.acquire()
        _THREAD.holds_lock = True
        torch.set_rng_state(states[0])
        for device, state in enumerate(states[1:]):
            torch.cuda.set_rng_state(state, device)


def draws(model: PreTrainedModel) -> bool:
    """Whether a training forward draws random numbers: for dropout, or the jitter of a router."""
    layers = (m.p for m in model.modules() if isinstance(m, nn.Dropout))
    # Attention has no dropout module: it stores the rate and calls the function.
    named = ((k, v) for m in model.modules() for k, v in vars(m).items())
    rates = (v for k, v in named if "drop" in k or "jitter" in k)
    return any(isinstance(p, float) and p > 0 for p in (*layers, *rates))


def _states() -> list[Tensor]:
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *on_devices]


def _number(name: str) -> int:
    # Seven bytes fit into the signed 64 bits of a seed. `hash` differs between processes.
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
