"""What is done to a session's KV cache at the trunk: cut, select, fill, take from.

Shapes: B sequences, H heads, T tokens, E width of a head. The cache itself is transformers' own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from fedsplit.errors import BadTensor, ProtocolError, SessionLost
from fedsplit.model.dryrun import FAMILY_ERRORS
from fedsplit.model.kv_cache import EmptyCacheLayer, GrowingLayer
from fedsplit.trunk.guard import require_finite
from fedsplit.wire.messages import KVCacheEntry

_ATTENTION = (GrowingLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


@dataclass(slots=True, kw_only=True, eq=False)
class SequenceCache:
    """The cache of a client's session: `tokens` of `rows` sequences, with the mask over them.

    `used` is the time of the last use, in seconds; `cache_tokens` is 0 for a cache that grows.
    """

    cache: Any
    client: str = ""
    cache_tokens: int = 0
    tokens: int = 0
    rows: int = 0
    mask_BT: Tensor | None = None
    used: float = 0.0
    num_bytes: int = 0

    def grow_mask(self, mask_BT: Tensor | None, tokens: int) -> None:
        """Take in the mask of the next tokens; none means all ones."""
        if mask_BT is None and self.mask_BT is None:
            return
        given = self.mask_BT if mask_BT is None else mask_BT
        assert given is not None, "one of both was found to be there"
        before, new = self.mask_BT, mask_BT
        if before is None:
            before = given.new_ones(self.rows, self.tokens)
        if new is None:
            new = given.new_ones(self.rows, tokens)
        self.mask_BT = torch.cat((before, new), dim=1)


def attends_only(cache: Any) -> bool:
    """Whether every block's state is keys and values of tokens, so that it can be cut anywhere."""
    return all(type(layer) in _ATTENTION for layer in _held(cache))


def cut_to(kept: SequenceCache, tokens: int) -> None:
    """Forget all but the first `tokens` tokens; with a window, also what it no longer reaches.

    Raises:
        SessionLost: The cache has forgotten what it would have to go back to.
    """
    removed = kept.tokens - tokens
    if not removed:
        return
    try:
        for layer in _held(kept.cache):
            layer.crop(-removed)
    except FAMILY_ERRORS as exc:
        raise SessionLost(f"this cache cannot go {removed} tokens back: {exc}") from exc
    kept.tokens = tokens
    if kept.mask_BT is not None:
        kept.mask_BT = kept.mask_BT[:, :tokens]


def select_rows(kept: SequenceCache, rows_B: Tensor) -> None:
    """Have the sequences be those at these places; one may be named several times.

    Raises:
        ProtocolError: There is no such sequence.
    """
    if not 0 <= int(rows_B.min()) <= int(rows_B.max()) < kept.rows:
        raise ProtocolError(f"rows {rows_B.tolist()[:8]} of {kept.rows} sequences")
    kept.cache.reorder_cache(rows_B)
    kept.rows = len(rows_B)
    if kept.mask_BT is not None:
        kept.mask_BT = kept.mask_BT[rows_B]


def num_bytes(cache: Any) -> int:
    """Bytes of all states in a cache."""
    return sum(
        tensor.untyped_storage().nbytes()  # with the room that it has for more
        for layer in _held(cache)
        for tensor in (*_keys_and_values(layer), *_states(layer))
    )


def num_bytes_of(probe: Any, tokens: int) -> int:
    """Bytes of a sequence of so many tokens, by the cache of one; a window keeps what it sees."""
    return sum(
        sum(tensor.nbytes for tensor in _keys_and_values(layer))
        * min(tokens, getattr(layer, "sliding_window", tokens))
        + sum(tensor.nbytes for tensor in _states(layer))
        for layer in _held(probe)
    )


def check_entries(entries: Sequence[KVCacheEntry], past: int, probe: Any) -> None:
    """Refuse a client's keys and values unless a cache of `past` tokens would hold them.

    Args:
        entries: What the client sent.
        past: How many tokens it says they are of.
        probe: A cache of the trunk with one token in it.

    Raises:
        ProtocolError: They are not those of the trunk's blocks, or these blocks keep other states.
        BadTensor: Their shapes are not those of the blocks' keys and values.
    """
    if not attends_only(probe):
        raise ProtocolError(
            "blocks of this trunk keep more than keys and values, which cannot travel; let the "
            "trunk keep them (kv=server)"
        )
    held = dict(_with_keys(probe))
    blocks = sorted(entry.block for entry in entries)
    if blocks != (sorted(held) if past else []):
        raise ProtocolError(
            f"a cache of {past} tokens came with blocks {blocks[:8]}, but the trunk's are "
            f"{sorted(held)[:8]}"
        )
    for entry in entries:
        layer = held[entry.block]
        least = min(past, getattr(layer, "sliding_window", past + 1) - 1)
        for name, ours in (("keys_BHTE", layer.keys), ("values_BHTE", layer.values)):
            _check_shape(f"{name} of block {entry.block}", getattr(entry, name), ours, least)
        require_finite(entry.keys_BHTE, f"keys_BHTE of block {entry.block}")
        require_finite(entry.values_BHTE, f"values_BHTE of block {entry.block}")


def filled(cache: Any, entries: Sequence[KVCacheEntry], past: int, probe: Any) -> Any:
    """A new cache with a client's keys and values in it, of `past` tokens; `probe` tells where."""
    for entry in entries:
        layer, device = cache.layers[entry.block], probe.layers[entry.block].keys.device
        layer.update(entry.keys_BHTE.to(device), entry.values_BHTE.to(device))
        if getattr(layer, "is_sliding", False):
            layer.cumulative_length = past
    return cache


def appended(cache: Any, tokens: int) -> tuple[KVCacheEntry, ...]:
    """The keys and values of the last `tokens` tokens, as far as the cache still has them."""
    return tuple(
        KVCacheEntry(
            block=index,
            keys_BHTE=layer.keys[:, :, -tokens:].contiguous().cpu(),
            values_BHTE=layer.values[:, :, -tokens:].contiguous().cpu(),
        )
        for index, layer in _with_keys(cache)
    )


def _check_shape(name: str, got_BHTE: Tensor, ours_BHTE: Tensor, least: int) -> None:
    B, H, T, E = got_BHTE.shape
    if (H, E) != (ours_BHTE.shape[1], ours_BHTE.shape[3]) or T < least:
        raise BadTensor(
            f"{name} has shape {tuple(got_BHTE.shape)}; {ours_BHTE.shape[1]} heads of width "
            f"{ours_BHTE.shape[3]} and at least {least} tokens are needed"
        )


def _with_keys(cache: Any) -> Iterator[tuple[int, Any]]:
    """The blocks that have keys and values of their own, with what they hold."""
    for index, layer in enumerate(cache.layers):
        if _keys_and_values(layer):
            yield index, layer


def _held(cache: Any) -> list[Any]:
    return [layer for layer in cache.layers if not isinstance(layer, EmptyCacheLayer)]


def _keys_and_values(layer: Any) -> list[Tensor]:
    both = (getattr(layer, name, None) for name in ("keys", "values"))
    return [tensor for tensor in both if isinstance(tensor, Tensor)]


def _states(layer: Any) -> Iterator[Tensor]:
    """What linear attention keeps in place of tokens."""
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name, None)
        for tensor in states.values() if isinstance(states, dict) else states or ():
            if isinstance(tensor, Tensor):
                yield tensor
