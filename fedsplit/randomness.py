"""Random numbers of one piece of work, whatever other threads of the process draw.

torch's default generators belong to the process. Clients that share one (an inline run, a test)
and the trunk's engine beside them would draw from each other's dropout; so who draws has the
generators to itself, and lets go of them while it waits for somebody else.
"""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_GENERATORS = threading.Lock()


def draws(model: PreTrainedModel) -> bool:
    """Whether a training forward of this model draws random numbers, which is: has dropout."""
    layers = (m.p for m in model.modules() if isinstance(m, nn.Dropout))
    # Attention keeps its rate as a number and calls the function.
    rates = (v for m in model.modules() for k, v in vars(m).items() if "drop" in k)
    return any(isinstance(p, float) and p > 0 for p in (*layers, *rates))


class _Mine(threading.local):
    """Whether this thread has the generators."""

    held = False


class Turn:
    """One worker's use of the generators, or that of several threads which work for it in turns.

    Args:
        needed: Whether this worker draws at all; if not, it never holds anybody up.
    """

    def __init__(self, *, needed: bool) -> None:
        self._needed = needed
        self._mine = _Mine()

    @contextmanager
    def drawing(self, name: str) -> Iterator[None]:
        """A block whose random numbers depend on `name` alone."""
        if not self._needed:
            yield
            return
        every = range(torch.accelerator.device_count())  # unnamed, torch warns of so many
        with _GENERATORS, torch.random.fork_rng(devices=every):
            torch.manual_seed(_seed(name))
            self._mine.held = True
            try:
                yield
            finally:
                self._mine.held = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block inside of `drawing` in which others may draw; then it goes on where it was."""
        if not self._mine.held:
            yield
            return
        kept = _states()
        self._mine.held = False
        _GENERATORS.release()
        try:
            yield
        finally:
            _GENERATORS.acquire()
            self._mine.held = True
            torch.set_rng_state(kept[0])
            for device, state in enumerate(kept[1:]):
                torch.cuda.set_rng_state(state, device)


def _states() -> list[Tensor]:
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *on_devices]


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
