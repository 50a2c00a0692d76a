"""The weightless modules that stand where a part holds none of the model's own.

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
from fedsplit.model.caches import RemoteCache


@dataclass(slots=True)
class Crossing:
    """What one call of a part needs at the cut, beside what the family hands its blocks.

    Families turn the 2-D mask into masks of their own before the first block, so the stand-ins
    cannot learn it from their arguments.
    """

    smashed_BTD: Tensor | None = None
    trunk_out_BTD: Tensor | None = None
    attention_mask_BT: Tensor | None = None
    position_ids_BT: Tensor | None = None
    cache: Any = None


class _Calls(threading.local):
    """The crossing of the call that this thread is in; several may run one part at once."""

    crossing: Crossing | None = None


_CALLS = _Calls()


@contextmanager
def crossing_at(crossing: Crossing) -> Iterator[None]:
    """Make `crossing` the one that the stand-ins of this thread see."""
    outer, _CALLS.crossing = _CALLS.crossing, crossing
    try:
        yield
    finally:
        _CALLS.crossing = outer


def _current(stand_in: str) -> Crossing:
    crossing = _CALLS.crossing
    if crossing is None:
        raise ConfigError(
            f"{stand_in} was reached without its model: call the part itself, not its backbone"
        )
    return crossing


class StandIn(nn.Module):
    """Stands for `original` without its weights; other attributes are still the original's.

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


class Absent(StandIn):
    """An embedding, norm or head that is elsewhere: hands its input on.

    What it returns never reaches a result (`Entry` replaces it, `Exit` precedes it); it only
    must not break the family's own forward.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The first tensor handed in, or a zero in place of an embedded one."""
        if isinstance(kwargs.get("inputs_embeds"), Tensor):
            embeds_BTD: Tensor = kwargs["inputs_embeds"]
            return embeds_BTD
        first: Tensor = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        is_embedding = isinstance(self.__dict__["_original"], nn.Embedding)
        return torch.zeros((), device=first.device) if is_embedding else first


class Skip(StandIn):
    """A block that is elsewhere: hands the hidden states on in the form the family expects."""

    def __init__(self, original: nn.Module, returns_tuple: bool) -> None:
        super().__init__(original)
        self.returns_tuple = returns_tuple

    def forward(self, hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        """`hidden_BTD` after `transform`, as a tensor or as a tuple of one."""
        out_BTD = self.transform(hidden_BTD)
        return (out_BTD,) if self.returns_tuple else out_BTD

    def transform(self, hidden_BTD: Tensor) -> Tensor:
        """What the block's absence does to the hidden states: nothing."""
        return hidden_BTD


class Entry(Skip):
    """The trunk's first stand-in: drops what the family computed, brings the smashed data in."""

    def transform(self, hidden_BTD: Tensor) -> Tensor:
        """The smashed data of this call."""
        smashed_BTD = _current("the trunk's entry").smashed_BTD
        assert smashed_BTD is not None, "TrunkPart.forward sets it"
        return smashed_BTD


class Exit(Skip):
    """The trunk's last stand-in: notes what leaves the trunk."""

    def transform(self, hidden_BTD: Tensor) -> Tensor:
        """`hidden_BTD`, noted as this call's trunk output, on the device of the smashed data."""
        crossing = _current("the trunk's exit")
        assert crossing.smashed_BTD is not None, "TrunkPart.forward sets it"
        crossing.trunk_out_BTD = hidden_BTD.to(crossing.smashed_BTD.device)
        return crossing.trunk_out_BTD


Carry = Callable[..., Tensor]
"""(hidden_BTD, *, attention_mask_BT, position_ids_BT, cache) -> hidden_BTD; part of autograd."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FarTrunk:
    """How a `Remote` reaches the trunk: one call, and where its KV caches come from."""

    carry: Carry
    new_cache: Callable[[int | None], RemoteCache]


def _not_connected(*args: Any, **kwargs: Any) -> Any:
    raise ConfigError("this client has no trunk: call connect(client, carry) first")


class Remote(Skip):
    """Stands at the trunk's first block in the client's model: a layer that is far away."""

    def __init__(self, original: nn.Module, returns_tuple: bool) -> None:
        super().__init__(original, returns_tuple)
        self.far = FarTrunk(carry=_not_connected, new_cache=_not_connected)

    def transform(self, hidden_BTD: Tensor) -> Tensor:
        """`hidden_BTD` carried to the trunk and back."""
        crossing = _current("the Remote layer")
        return self.far.carry(
            hidden_BTD,
            attention_mask_BT=crossing.attention_mask_BT,
            position_ids_BT=crossing.position_ids_BT,
            cache=crossing.cache,
        )
