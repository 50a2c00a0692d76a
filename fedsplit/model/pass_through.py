"""Modules without weights, which replace the modules of the model that a part does not hold.

Shapes: B batch, T tokens, D width.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from fedsplit.errors import ConfigError
from fedsplit.model.kv_cache import RemoteCache


@dataclass(slots=True)
class CutContext:
    """The data of one call of a part at the cut, beside the arguments of the family's blocks.

    A family converts the 2-D mask to its own form before the first block, so a pass-through does
    not get it as an argument.

    Attributes:
        remote: The `Remote` layer of the client's model; None in a trunk.
        smashed_BTD: The trunk's input.
        trunk_out_BTD: The trunk's output.
        attention_mask_BT: 1 for a token, 0 for padding; None if all are tokens.
        position_ids_BT: The positions of the tokens; None if the family counts them itself.
        cache: The trunk's KV cache; None without one.
    """

    remote: "Remote | None" = None
    smashed_BTD: Tensor | None = None
    trunk_out_BTD: Tensor | None = None
    attention_mask_BT: Tensor | None = None
    position_ids_BT: Tensor | None = None
    cache: Any = None


class _Calls(threading.local):
    """The context of this thread's current call; several threads may call one part at once."""

    context: CutContext | None = None


_CALLS = _Calls()


@contextmanager
def cut_context(context: CutContext) -> Iterator[None]:
    """Make `context` the context of this thread's pass-throughs."""
    # Contexts nest: a client and its trunk in one process run in one thread.
    outer, _CALLS.context = _CALLS.context, context
    try:
        yield
    finally:
        _CALLS.context = outer


def is_in_call(remote: "Remote") -> bool:
    """Whether this thread's current call is one of the model with this `Remote`."""
    return _CALLS.context is not None and _CALLS.context.remote is remote


def calling_remote(otherwise: "Remote") -> "Remote":
    """The `Remote` of this thread's current call, or else `otherwise`.

    It is in the place of the trunk, so its mode is that of the trunk's modules.
    """
    context = _CALLS.context
    return otherwise if context is None or context.remote is None else context.remote


def _current(place: str) -> CutContext:
    context = _CALLS.context
    if context is None:
        raise ConfigError(
            f"{place} was reached without its model: call the part itself, not its backbone"
        )
    return context


class PassThrough(nn.Module):
    """A replacement of `original` without its weights, but with its other attributes.

    Families read attributes such as `attention_type` from modules that a part does not hold. The
    original is on the meta device and is not registered, so its parameters and buffers are not in
    the part's state dict.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # Not as an attribute, which would register it as a submodule.
        self.__dict__["_original"] = original

    @property
    def original(self) -> nn.Module:
        """The module that this one replaces."""
        original: nn.Module = self.__dict__["_original"]
        return original

    def __getattr__(self, name: str) -> Any:
        """The module's own attribute, or else the original's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"], name)


class PassThroughModule(PassThrough):
    """A replacement of an embedding, norm or head of the other part; returns its input.

    Its output is never part of a result: `TrunkEntry` discards it, or `TrunkExit` runs before it.
    It only has to fit into the family's forward.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The first tensor among the arguments, or a zero for an embedding."""
        if isinstance(kwargs.get("inputs_embeds"), Tensor):
            embeds_BTD: Tensor = kwargs["inputs_embeds"]
            return embeds_BTD
        first: Tensor = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        # The input of an embedding is ids, which do not have the shape of hidden states. A zero
        # without dimensions can be added to hidden states of any shape.
        is_embedding = isinstance(self.__dict__["_original"], nn.Embedding)
        return torch.zeros((), device=first.device) if is_embedding else first


class PassThroughBlock(PassThrough):
    """A replacement of a block of the other part; returns its input as the family's blocks do.

    Args:
        original: The block.
        returns_tuple: Whether the family's blocks return a tuple instead of a tensor.
    """

    def __init__(self, original: nn.Module, returns_tuple: bool) -> None:
        super().__init__(original)
        self.returns_tuple = returns_tuple

    def forward(
        self, hidden_BTD: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor, None]:
        """`hidden_BTD` itself, as a tensor or in a tuple with no attention weights."""
        return (hidden_BTD, None) if self.returns_tuple else hidden_BTD


class TrunkEntry(PassThroughBlock):
    """The trunk's first pass-through: returns the smashed data instead of its input."""

    def forward(
        self, hidden_BTD: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor, None]:
        """The smashed data of this call."""
        # `hidden_BTD` has position embeddings, norms or factors that the bottom applied already.
        smashed_BTD = _current("the trunk's entry").smashed_BTD
        assert smashed_BTD is not None, "TrunkPart.forward sets it"
        return (smashed_BTD, None) if self.returns_tuple else smashed_BTD


class TrunkExit(PassThroughBlock):
    """The trunk's last pass-through: keeps the trunk's output in the `CutContext`."""

    def forward(
        self, hidden_BTD: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor, None]:
        """`hidden_BTD` on the device of the smashed data; it becomes this call's trunk output."""
        context = _current("the trunk's exit")
        assert context.smashed_BTD is not None, "TrunkPart.forward sets it"
        context.trunk_out_BTD = out_BTD = hidden_BTD.to(context.smashed_BTD.device)
        return (out_BTD, None) if self.returns_tuple else out_BTD


Carry = Callable[..., Tensor]
"""(hidden_BTD, *, attention_mask_BT, position_ids_BT, cache) -> hidden_BTD, with autograd."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrunkConnection:
    """The functions through which a `Remote` calls its trunk.

    Attributes:
        carry: Runs hidden states through the trunk.
        new_cache: Creates a KV cache at the trunk, growing or of a number of tokens.
    """

    carry: Carry
    new_cache: Callable[[int | None], RemoteCache]

    def __reduce__(self) -> tuple[Any, ...]:
        """For a copy: a trunk in this process is copied too, and a link to one is not.

        Both clients would train a trunk that they share, and neither could see it.
        """
        is_here = isinstance(getattr(self.carry, "__self__", None), nn.Module)
        ends = (self.carry, self.new_cache) if is_here else (_not_copied, _not_copied)
        return _connection, ends


def _connection(carry: Carry, new_cache: Callable[[int | None], RemoteCache]) -> TrunkConnection:
    return TrunkConnection(carry=carry, new_cache=new_cache)


def _not_connected(*args: Any, **kwargs: Any) -> Any:
    raise ConfigError("this client has no trunk: call connect(client, carry) first")


def _not_copied(*args: Any, **kwargs: Any) -> Any:
    raise ConfigError("a copy of a client has no trunk: call connect(copy, carry) first")


class Remote(PassThroughBlock):
    """The replacement of the trunk's first block in the client's model; it calls the trunk."""

    def __init__(self, original: nn.Module, returns_tuple: bool) -> None:
        super().__init__(original, returns_tuple)
        self.connection = TrunkConnection(carry=_not_connected, new_cache=_not_connected)

    def forward(
        self, hidden_BTD: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor, None]:
        """The trunk's output, as a tensor or in a tuple with no attention weights."""
        context = _current("the Remote layer")
        is_bare = context.attention_mask_BT is None and context.cache is None
        caches = (value for value in (*args, *kwargs.values()) if isinstance(value, Cache))
        if is_bare and context.position_ids_BT is not None and any(True for _ in caches):
            # Without mask and cache, transformers takes positions that restart for packed
            # sequences. The client's blocks have a cache here, and the trunk has none.
            context.attention_mask_BT = hidden_BTD.new_ones(hidden_BTD.shape[:2], dtype=torch.long)
        context.smashed_BTD = hidden_BTD
        context.trunk_out_BTD = out_BTD = self._carry(context, context.cache)
        return (out_BTD, None) if self.returns_tuple else out_BTD

    def filled_cache(self, context: CutContext) -> RemoteCache:
        """A KV cache of the trunk that holds the tokens of an earlier call."""
        cache = self.connection.new_cache(None)
        self._carry(context, cache)
        return cache

    # torch.compile cannot trace the exchange with a trunk elsewhere.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no types for it
    def _carry(self, context: CutContext, cache: Any) -> Tensor:
        return self.connection.carry(
            context.smashed_BTD,
            attention_mask_BT=context.attention_mask_BT,
            position_ids_BT=context.position_ids_BT,
            cache=cache,
        )
