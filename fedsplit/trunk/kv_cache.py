"""Operations on a session's KV cache at the trunk: crop, select rows, fill, read, and check.

Shapes: B sequences, H heads, T tokens, E width of a head. The cache itself is transformers' own.
"""

import copy
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from fedsplit.model.stage import TrunkPart
from fedsplit.trunk.guard import require_finite
from fedsplit.wire.messages import GenerateRequest, KVCacheEntry

_ATTENTION = (GrowingLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


@dataclass(slots=True, kw_only=True, eq=False)
class SequenceCache:
    """The cache of a session: `tokens` tokens in each of `rows` sequences, and their mask.

    `used` is the time of the last use, in seconds, and `decodes` whether that was for a few tokens
    and not for a prompt. `cache_tokens` is the fixed number of tokens per
    sequence, or 0 for a cache that grows. `autocast` is the precision that the tokens were computed
    in, or empty for that of the weights. `changed_at` is the last call that removed or reordered
    tokens.
    """

    cache: Any
    client: str = ""
    cache_tokens: int = 0
    tokens: int = 0
    rows: int = 0
    mask_BT: Tensor | None = None
    autocast: str = ""
    changed_at: int = 0
    used: float = 0.0
    decodes: bool = False
    num_bytes: int = 0

    def grow_mask(self, mask_BT: Tensor | None, tokens: int) -> None:
        """Append the mask of the next tokens; None means all ones."""
        # No mask is made if there is none, because attention can then omit it.
        if mask_BT is None and self.mask_BT is None:
            return
        like = self.mask_BT if mask_BT is None else mask_BT
        assert like is not None, "at least one of the two masks is present"
        before, new = self.mask_BT, mask_BT
        if before is None:
            before = like.new_ones(self.rows, self.tokens)
        if new is None:
            new = like.new_ones(self.rows, tokens)
        self.mask_BT = torch.cat((before, new), dim=1)


def first_to_go(caches: Mapping[str, SequenceCache], busy: Collection[str]) -> str:
    """Return the session whose cache makes room for others; empty if none should.

    Args:
        caches: The caches of all sessions.
        busy: The sessions of the present pass.
    """
    held: Counter[str] = Counter()
    for each in caches.values():
        held[each.client] += each.num_bytes
    candidates = {name: each for name, each in caches.items() if each.num_bytes}
    if len(candidates) == 1 and candidates.keys() <= set(busy):
        return ""
    # Those of the pass last: each is about to send its next token. Not simply the least recently
    # used: then a client with many caches could evict those of all others.
    return min(
        candidates,
        key=lambda name: (
            name in busy,
            -held[candidates[name].client],
            candidates[name].used,
        ),
        default="",
    )


def has_fixed_caches(trunk: TrunkPart) -> bool:
    """Return whether a trunk's family can use a cache of a fixed size, with a mask; tries it."""
    hidden_BTD = torch.zeros(1, 2, trunk.config.hidden_size, dtype=trunk.dtype)
    mask_BT = torch.ones(1, 2, dtype=torch.int64)
    try:
        with torch.no_grad():
            placed = hidden_BTD.to(trunk.device), mask_BT.to(trunk.device)
            trunk.run(*placed, cache=trunk.new_cache(4))
    except FAMILY_ERRORS:
        return False
    return True


def attends_only(cache: Any) -> bool:
    """Return whether all states are keys and values of tokens, so that the cache can be cropped."""
    # By exact type: a subclass may keep further states.
    return all(type(layer) in _ATTENTION for layer in _layers(cache))


def continued_by(
    request: GenerateRequest, session: str, caches: Mapping[str, SequenceCache]
) -> SequenceCache:
    """Return the cache whose first tokens a request continues: its session's, or its source's.

    Raises:
        SessionLost: The cache is gone, has other tokens by now, or is of another precision.
        ProtocolError: The request names a source, but its session holds tokens already.
    """
    sequences = caches.get(session)
    if sequences is None:
        raise SessionLost(f"the cache of session {session} is gone; send its tokens again")
    if request.source:
        if sequences.tokens:
            raise ProtocolError(
                f"session {session} holds {sequences.tokens} tokens already; name a source in the "
                "first request of a session"
            )
        session, copied = request.source, caches.get(request.source)
        # One answer for both, so that nobody learns of the sessions of other clients.
        if copied is None or copied.client != sequences.client:
            raise SessionLost(f"the cache of session {session} is gone; send its tokens again")
        is_other = copied.cache_tokens != sequences.cache_tokens
        if is_other or copied.changed_at > request.source_call:
            raise SessionLost(
                f"session {session} has changed since its call {request.source_call}, or has a "
                "cache of another size; send its tokens again"
            )
        sequences = copied
    if request.past > sequences.tokens:
        raise SessionLost(
            f"session {session} holds {sequences.tokens} tokens, but this request continues "
            f"{request.past}; send its tokens again"
        )
    # Attention takes no keys of another precision, and a pass that fails loses its sessions.
    if request.past and request.autocast != sequences.autocast:
        raise SessionLost(
            f"session {session} was computed with autocast={sequences.autocast or 'off'}, but "
            f"this request asks for {request.autocast or 'off'}; send its tokens again"
        )
    return sequences


def crop(sequences: SequenceCache, tokens: int) -> None:
    """Drop all but the first `tokens` tokens; with a window, also those outside of the window.

    Raises:
        SessionLost: The cache no longer holds the earlier tokens of its window, or cannot crop.
    """
    removed = sequences.tokens - tokens
    if not removed:
        return
    for layer in _layers(sequences.cache):
        _crop_layer(layer, removed)
    sequences.tokens = tokens
    if sequences.mask_BT is not None:
        sequences.mask_BT = sequences.mask_BT[:, :tokens]


def copy_tokens(source: SequenceCache, tokens: int, into: SequenceCache) -> None:
    """Replace a cache by a copy of the first `tokens` tokens of another one.

    Raises:
        SessionLost: Tokens cannot be removed from a copy, as in `crop`.
    """
    removed = source.tokens - tokens
    into.cache.layers = [_copied(layer, tokens, removed) for layer in source.cache.layers]
    into.tokens, into.rows, into.autocast = tokens, source.rows, source.autocast
    into.mask_BT = None if source.mask_BT is None else source.mask_BT[:, :tokens]
    into.num_bytes = num_bytes(into.cache)


def _copied(layer: Any, tokens: int, removed: int) -> Any:
    # Without the tokens to remove and without room that is not filled.
    if type(layer) is GrowingLayer and layer.is_initialized:
        copied = type(layer)()
        copied.update(layer.keys[:, :, :tokens], layer.values[:, :, :tokens])
        return copied
    copied = copy.deepcopy(layer)
    if removed:
        _crop_layer(copied, removed)
    return copied


def _crop_layer(layer: Any, removed: int) -> None:
    try:
        # Negative: the number of tokens to remove. A positive number would be the new length.
        layer.crop(-removed)
    except FAMILY_ERRORS as exc:
        raise SessionLost(
            f"the last {removed} tokens cannot be removed from this cache ({exc}); send its tokens "
            "again"
        ) from exc


def select_rows(sequences: SequenceCache, rows_B: Tensor) -> None:
    """Replace the sequences by those at these indices; an index may occur several times.

    Raises:
        ProtocolError: An index is out of range.
    """
    # A negative index would be accepted, and one too large makes the context of a GPU unusable.
    if not 0 <= int(rows_B.min()) <= int(rows_B.max()) < sequences.rows:
        raise ProtocolError(
            f"rows {rows_B.tolist()[:8]} were asked for, but the cache holds {sequences.rows} "
            f"sequences; send indices from 0 to {sequences.rows - 1}"
        )
    sequences.cache.reorder_cache(rows_B)
    sequences.rows = len(rows_B)
    if sequences.mask_BT is not None:
        sequences.mask_BT = sequences.mask_BT[rows_B]


def num_bytes(cache: Any) -> int:
    """Return the bytes of all states in a cache, with the memory reserved for further tokens."""
    return sum(
        tensor.untyped_storage().nbytes()  # the tensor is a view of the reserved memory
        for layer in _layers(cache)
        for tensor in (*_keys_and_values(layer), *_states(layer))
    )


def num_bytes_of(probe: Any, tokens: int) -> int:
    """Return the bytes of a sequence of `tokens` tokens, from a cache of one token."""
    # A layer with a window never holds more tokens than its window.
    return sum(
        sum(tensor.nbytes for tensor in _keys_and_values(layer))
        * min(tokens, getattr(layer, "sliding_window", tokens))
        + sum(tensor.nbytes for tensor in _states(layer))
        for layer in _layers(probe)
    )


def check_entries(entries: Sequence[KVCacheEntry], past: int, probe: Any) -> None:
    """Refuse a client's keys and values if they are not those of a cache of `past` tokens.

    Args:
        entries: The keys and values that the client sent.
        past: The number of tokens, according to the client.
        probe: A cache of the trunk with one token.

    Raises:
        ProtocolError: They are of other blocks than the trunk's, or the blocks keep other states.
        BadTensor: Their shapes are not those of the blocks' keys and values.
    """
    if not attends_only(probe):
        raise ProtocolError(
            "blocks of this trunk keep more than keys and values, which cannot travel; let the "
            "trunk keep them (kv=server)"
        )
    layers = dict(_attention_layers(probe))
    blocks = sorted(entry.block for entry in entries)
    if blocks != (sorted(layers) if past else []):
        raise ProtocolError(
            f"a cache of {past} tokens came with blocks {blocks[:8]}, but the trunk's are "
            f"{sorted(layers)[:8]}; send each block of the trunk once, and none for 0 tokens"
        )
    for entry in entries:
        layer = layers[entry.block]
        # A window keeps one token less than its size, because the next token is part of it.
        least = min(past, getattr(layer, "sliding_window", past + 1) - 1)
        for name, ours in (("keys_BHTE", layer.keys), ("values_BHTE", layer.values)):
            _check_shape(f"{name} of block {entry.block}", getattr(entry, name), ours, least)
        require_finite(entry.keys_BHTE, f"keys_BHTE of block {entry.block}")
        require_finite(entry.values_BHTE, f"values_BHTE of block {entry.block}")


def fill(cache: Any, entries: Sequence[KVCacheEntry], past: int, probe: Any) -> Any:
    """Put a client's keys and values of `past` tokens into a new cache, on the probe's devices."""
    for entry in entries:
        layer, device = cache.layers[entry.block], probe.layers[entry.block].keys.device
        layer.update(entry.keys_BHTE.to(device), entry.values_BHTE.to(device))
        # The layer has counted the tokens that it was given, but more came before its window.
        if getattr(layer, "is_sliding", False):
            layer.cumulative_length = past
    return cache


def last_entries(cache: Any, tokens: int, dtype: torch.dtype) -> tuple[KVCacheEntry, ...]:
    """Return the keys and values of the last `tokens` tokens, as far as the cache holds them.

    They travel in `dtype`, the wire's. Autocast makes some in a smaller one, which that holds.
    """
    return tuple(
        KVCacheEntry(
            block=index,
            keys_BHTE=layer.keys[:, :, -tokens:].to("cpu", dtype).contiguous(),
            values_BHTE=layer.values[:, :, -tokens:].to("cpu", dtype).contiguous(),
        )
        for index, layer in _attention_layers(cache)
    )


def _check_shape(name: str, got_BHTE: Tensor, ours_BHTE: Tensor, least: int) -> None:
    B, H, T, E = got_BHTE.shape
    if (H, E) != (ours_BHTE.shape[1], ours_BHTE.shape[3]) or T < least:
        raise BadTensor(
            f"{name} has shape {tuple(got_BHTE.shape)}, but the trunk needs {ours_BHTE.shape[1]} "
            f"heads of width {ours_BHTE.shape[3]} and at least {least} tokens; send its own entries"
        )


def _attention_layers(cache: Any) -> Iterator[tuple[int, Any]]:
    """Yield the index and the cache layer of each block with keys and values of its own."""
    for index, layer in enumerate(cache.layers):
        if _keys_and_values(layer):
            yield index, layer


def _layers(cache: Any) -> list[Any]:
    return [layer for layer in cache.layers if not isinstance(layer, EmptyCacheLayer)]


def _keys_and_values(layer: Any) -> list[Tensor]:
    states = (getattr(layer, name, None) for name in ("keys", "values"))
    return [tensor for tensor in states if isinstance(tensor, Tensor)]


def _states(layer: Any) -> Iterator[Tensor]:
    """Yield the states that linear attention keeps instead of keys and values of tokens."""
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name, None)
        for tensor in states.values() if isinstance(states, dict) else states or ():
            if isinstance(tensor, Tensor):
                yield tensor
