"""Counts the functions of fedsplit that the hidden states of one training forward pass through.

    python -m simulations.figures --hops

A tiny GPT-2 trains some steps over a `LocalLink`, and a profile function sees every call in every
thread while the client's model runs. A hop is a function or method of fedsplit that is called with
the hidden states or returns them: as a tensor, or inside a message, a tuple, a dataclass, a
partial, a closure or a future. All other functions are helpers. A function counts once, however
often it is called. A lambda counts as a function, a comprehension does not. Calls of the trunk's
thread after it has set the reply do not count.

The result does not depend on timing: each step has its own sequence length, which identifies its
hidden states, and only a function that all steps call with them is a hop.
"""

import dataclasses
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import fedsplit
from fedsplit import ClientTrainer, LocalLink, RemoteTrunk, RunSpec, SplitSpec, TrunkService
from fedsplit.data.batches import Batch
from fedsplit.spec import DataSpec, TrainSpec

_PACKAGE = Path(fedsplit.__file__).parent
# Python 3.12 inlines comprehensions; left out, so that every version counts the same.
_INLINED = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")
_LENGTHS = (12, 13, 14, 15)
_WIDTH = 32
_DEPTH = 12
"""How many containers inside one another are searched for the hidden states."""


class Function(NamedTuple):
    """A function of fedsplit, and the side whose thread runs it."""

    side: str
    file: str
    name: str

    def __str__(self) -> str:
        return f"{self.side:6}  {self.file}: {self.name}"


def forward_functions() -> dict[Function, bool]:
    """Return the functions that every training forward calls, in order; True for a hop."""
    tracer = _Tracer()
    with tracer.installed():
        _train(tracer)
    first, *others = tracer.forwards
    return {
        function: all(each[function] for each in tracer.forwards)
        for function in first
        if all(function in each for each in others)
    }


def forward_hops() -> list[Function]:
    """Return the hops of a training forward, in order."""
    return [function for function, is_hop in forward_functions().items() if is_hop]


class _Tracer:
    """Records the functions of fedsplit that run during a forward of the client's model."""

    def __init__(self) -> None:
        self.forwards: list[dict[Function, bool]] = []
        self._client = threading.get_ident()
        self._shape = torch.Size()
        self._replied: set[int] = set()
        self._is_open = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Trace this thread, and threads that start in the block."""
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def begin(self, *_: Any) -> None:
        """Start to record a forward; a forward pre-hook of the client's model."""
        self._shape = torch.Size((2, _LENGTHS[len(self.forwards)], _WIDTH))
        self.forwards.append({})
        self._replied.clear()
        self._is_open = True

    def end(self, *_: Any) -> None:
        """Stop recording; a forward hook of the client's model."""
        self._is_open = False

    def _profile(self, frame: FrameType, event: str, returned: object) -> None:
        thread, code = threading.get_ident(), frame.f_code
        if not self._is_open or thread in self._replied or event not in ("call", "return"):
            return
        # From here on the trunk's thread races with the client's, so it is not traced any more.
        if code is Future.set_result.__code__ and thread != self._client and event == "return":
            self._replied.add(thread)
        elif function := self._function(code):
            values = frame.f_locals.values() if event == "call" else [returned]
            recorded = self.forwards[-1]
            recorded[function] = recorded.get(function, False) or self._any_holds(values, _DEPTH)

    def _function(self, code: CodeType) -> Function | None:
        file = Path(code.co_filename)
        if not file.is_relative_to(_PACKAGE) or code.co_name in _INLINED:
            return None
        is_lambda = code.co_name == "<lambda>"
        line = f" in line {code.co_firstlineno}" if is_lambda else ""
        side = "client" if threading.get_ident() == self._client else "trunk"
        return Function(side, file.relative_to(_PACKAGE).as_posix(), code.co_qualname + line)

    def _any_holds(self, values: Iterable[object], depth: int) -> bool:
        # A list: another thread may change the container meanwhile.
        return depth > 0 and any(self._holds(value, depth - 1) for value in list(values))

    def _holds(self, value: object, depth: int) -> bool:
        """Return whether a value contains the hidden states."""
        if isinstance(value, Tensor):
            return value.shape == self._shape
        return self._any_holds(_inside(value), depth)


def _inside(value: object) -> Iterable[object]:
    match value:
        case tuple() | list():
            return value
        case dict():
            return value.values()
        case partial():
            return (value.func, *value.args, *value.keywords.values())
        case FunctionType():
            return (cell.cell_contents for cell in value.__closure__ or ())
        case Future():
            return [value.result()] if value.done() and not value.exception() else ()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return (getattr(value, field.name, None) for field in dataclasses.fields(value))
    return ()


def _train(tracer: _Tracer) -> None:
    run = RunSpec(
        split=SplitSpec.parse("1/2/1"),
        train=TrainSpec(batch_size=2),
        data=DataSpec(sequence_length=max(_LENGTHS)),
    )
    config = GPT2Config(
        n_layer=4,
        n_embd=_WIDTH,
        n_head=4,
        vocab_size=256,
        n_positions=max(_LENGTHS),
        bos_token_id=0,
        eos_token_id=0,
    )
    parts = fedsplit.split_model(GPT2LMHeadModel(config), run.split)
    with TrunkService(parts.trunk, run) as service:
        link = LocalLink(service, token=service.admit("alice"))
        trunk = RemoteTrunk(link, parts.client, run, client="alice")
        fedsplit.connect(parts.client, trunk)
        trainer = ClientTrainer(parts.client, trunk, run)
        with trunk.session():
            # Lazy initialization runs in this step, which is not traced.
            trainer.step([_batch(max(_LENGTHS))])
            parts.client.register_forward_pre_hook(tracer.begin)
            parts.client.register_forward_hook(tracer.end)
            for length in _LENGTHS:
                trainer.step([_batch(length)])


def _batch(length: int) -> Batch:
    ids_BT = torch.arange(2 * length).reshape(2, length)
    return Batch(
        inputs={"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)},
        labels=ids_BT,
        num_tokens=2 * (length - 1),
        num_bytes=2 * (length - 1),
    )
