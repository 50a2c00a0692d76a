"""Modules without weights, in place of those of the model that a part does not hold.

Shapes: B batch, T tokens, D width.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.errors import ConfigError
from fedsplit.model.kv_cache import RemoteCache


@dataclass(slots=True)
class CutContext:
    """What one call of a part needs at the cut, beside the arguments of the family's blocks.

    Families turn the 2-D mask into masks of their own before the first block, so the arguments of
    a pass-through do not hold it.
    """

    smashed_BTD: Tensor | None = None
    trunk_out_BTD: Tensor | None = None
    attention_mask_BT: Tensor | None = None
    position_ids_BT: Tensor | None = None
    cache: Any = None


class _Calls(threading.local):
    """The context of the call that this thread is in; several may run one part at once."""

    context: CutContext | None = None


_CALLS = _Calls()


@contextmanager
def cut_context(context: CutContext) -> Iterator[None]:
    """Make `context` the one that the pass-throughs of this thread see."""
    outer, _CALLS.context = _CALLS.context, context
    try:
        yield
    finally:
        _CALLS.context = outer


def _current(place: str) -> CutContext:
    context = _CALLS.context
    if context is None:
        raise ConfigError(
            f"{place} was reached without its model: call the part itself, not its backbone"
        )
    return context


class PassThrough(nn.Module):
    """Takes the place of `original` without its weights; other attributes are the original's.

    The original is kept unregistered (it lives on the meta device), so no parameter, buffer or
    state dict entry of it is seen.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["_original"] = original

    def __getattr__(self, name: str) -> Any:
        """Look where a module does, then at the original."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"], name)


class PassThroughModule(PassThrough):
    """In place of an embedding, norm or head of the other part: returns its input.

    Its output never reaches a result: `TrunkEntry` replaces it, and `TrunkExit` runs before it. It
    only must not break the family's own forward.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The first tensor among the arguments, or a zero in place of an embedding's output."""
        if isinstance(kwargs.get("inputs_embeds"), Tensor):
            embeds_BTD: Tensor = kwargs["inputs_embeds"]
            return embeds_BTD
        first: Tensor = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        is_embedding = isinstance(self.__dict__["_original"], nn.Embedding)
        return torch.zeros((), device=first.device) if is_embedding else first


class PassThroughBlock(PassThrough):
    """In place of a block of the other part: returns its input in the form the family expects."""

    def __init__(self, original: nn.Module, returns_tuple: bool) -> None:
        super().__init__(original)
        self.returns_tuple = returns_tuple

    def forward(self, hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        """`hidden_BTD` after `transform`, as a tensor or as a tuple of one."""
        out_BTD = self.transform(hidden_BTD)
        return (out_BTD,) if self.returns_tuple else out_BTD

    def transform(self, hidden_BTD: Tensor) -> Tensor:
        """`hidden_BTD` itself."""
        return hidden_BTD


class TrunkEntry(PassThroughBlock):
    """The trunk's first pass-through: returns the smashed data in place of its input."""

    def transform(self, hidden_BTD: Tensor) -> Tensor:
        """The smashed data of this call."""
        smashed_BTD = _current("the trunk's entry").smashed_BTD
        assert smashed_BTD is not None, "TrunkPart.forward sets it"
        return smashed_BTD


class TrunkExit(PassThroughBlock):
    """The trunk's last pass-through: keeps the trunk's output in the `CutContext`."""

    def transform(self, hidden_BTD: Tensor) -> Tensor:
        """`hidden_BTD` on the device of the smashed data; kept as this call's trunk output."""
        context = _current("the trunk's exit")
        assert context.smashed_BTD is not None, "TrunkPart.forward sets it"
        context.trunk_out_BTD = hidden_BTD.to(context.smashed_BTD.device)
        return context.trunk_out_BTD


Carry = Callable[..., Tensor]
"""(hidden_BTD, *, attention_mask_BT, position_ids_BT, cache) -> hidden_BTD; part of autograd."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrunkConnection:
    """How a `Remote` reaches the trunk: one call, and where its KV caches come from."""

    carry: Carry
    new_cache: Callable[[int | None], RemoteCache]


def _not_connected(*args: Any, **kwargs: Any) -> Any:
    raise ConfigError("this client has no trunk: call connect(client, carry) first")


class Remote(PassThroughBlock):
    """In place of the trunk's first block in the client's model: calls the trunk."""

    def __init__(self, original: nn.Module, returns_tuple: bool) -> None:
        super().__init__(original, returns_tuple)
        self.connection = TrunkConnection(carry=_not_connected, new_cache=_not_connected)

    def transform(self, hidden_BTD: Tensor) -> Tensor:
        """The trunk's output for `hidden_BTD`."""
        context = _current("the Remote layer")
        return self.connection.carry(
            hidden_BTD,
            attention_mask_BT=context.attention_mask_BT,
            position_ids_BT=context.position_ids_BT,
            cache=context.cache,
        )
