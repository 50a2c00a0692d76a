"""KV caches of a part: the family's layers, and empty layers for the blocks of the other part."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from torch import LongTensor, Tensor
from transformers import Cache, DynamicCache, PretrainedConfig, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fedsplit.errors import UnsupportedModel


class RemoteCache(Protocol):
    """The trunk's KV cache, or a proxy of it: the operations of `generate` on a cache."""

    def reset(self) -> None:
        """Remove all tokens."""

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens."""

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Put the rows in the order of `beam_idx`."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows in `indices`."""

    def activate_past_recording(self) -> None:
        """Keep the tokens that leave a sliding window until the next crop."""


_NO_COUNT = "this part holds no attention layer, so its cache cannot count the tokens; move the cut"

# In tokens. A shorter text allocates once.
_SMALLEST_CAPACITY = 64


def capacity(tokens: int) -> int:
    """The number of tokens for which a growing cache allocates memory to hold `tokens`.

    >>> capacity(1), capacity(65), capacity(2000)
    (64, 128, 2048)
    """
    # Steps grow with the cache, so copies stay rare. From 512 tokens, at most 1/8 is unused.
    step = max(_SMALLEST_CAPACITY, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


class EmptyCacheLayer:
    """The cache layer of a block that the part does not hold; it stores nothing."""

    # transformers reads these attributes from every layer of a cache.
    is_sliding = False
    is_compileable = True
    is_croppable = True
    supports_early_init = False
    is_initialized = True
    keys: Tensor | None = None
    values: Tensor | None = None

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def reset(self) -> None:
        """Do nothing."""

    def crop(self, tokens_to_remove: int) -> None:
        """Do nothing."""

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Do nothing."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Do nothing."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Do nothing."""


class RemoteSlot(EmptyCacheLayer):
    """The layer in the client's cache that forwards operations to the trunk's cache.

    Args:
        new_remote: Makes the trunk's cache at its first use. Families return a cache from every
            forward, and most are never used.
    """

    def __init__(self, new_remote: Callable[[], RemoteCache]) -> None:
        self._new_remote = new_remote
        self._remote: RemoteCache | None = None

    @property
    def remote(self) -> RemoteCache:
        """The trunk's cache."""
        if self._remote is None:
            self._remote = self._new_remote()
        return self._remote

    def reset(self) -> None:
        """Remove all tokens at the trunk."""
        self.remote.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens at the trunk."""
        self.remote.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Put the trunk's rows in the order of `beam_idx`."""
        self.remote.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the trunk's cache."""
        self.remote.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the trunk's rows in `indices`."""
        self.remote.batch_select_indices(indices)

    def activate_past_recording(self) -> None:
        """Keep the tokens that leave the trunk's sliding windows until the next crop."""
        self.remote.activate_past_recording()


class GrowingLayer(DynamicLayer):
    """Keys and values in buffers with spare capacity, so that a new token copies no earlier ones.

    `keys` and `values` are views of the filled part, [batch, heads, tokens, head width].
    """

    keys: Tensor
    values: Tensor
    _buffers: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Initialize the layer without buffers."""
        super().lazy_initialization(key_states, value_states)
        self._buffers = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the keys and values of the next tokens; return those of all tokens."""
        # A graph may hold views of the buffers, and autograd refuses a backward after a write
        # into them.
        if key_states.requires_grad or value_states.requires_grad:
            self._buffers = None
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, added = self.get_seq_length(), key_states.shape[-2]
        end = past + added
        if self._buffers is None or end > self._buffers[0].shape[-2]:
            self._buffers = self._larger((key_states, value_states), past, capacity(end))
        keys, values = self._buffers
        # `narrow` takes less time than an index, and this runs for every token in every block.
        keys.narrow(-2, past, added).copy_(key_states)
        values.narrow(-2, past, added).copy_(value_states)
        self._fill(end)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Put the rows in the order of `beam_idx`."""
        self._transform(lambda buffer: buffer.index_select(0, beam_idx.to(buffer.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._transform(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows in `indices`."""
        self._transform(lambda buffer: buffer[indices])

    def _larger(self, like: tuple[Tensor, Tensor], past: int, tokens: int) -> tuple[Tensor, Tensor]:
        buffers = []
        for states, before in zip(like, (self.keys, self.values), strict=True):
            batch, heads, _, width = states.shape
            buffer = states.new_empty(batch, heads, tokens, width)
            if past:
                buffer[:, :, :past] = before
            buffers.append(buffer)
        return buffers[0], buffers[1]

    def _transform(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.get_seq_length():
            return
        filled = self.get_seq_length()
        # The buffers and not only their filled part, so that the capacity remains.
        keys, values = self._buffers or (self.keys, self.values)
        self._buffers = change(keys), change(values)
        self._fill(filled)

    def _fill(self, tokens: int) -> None:
        assert self._buffers is not None, "a caller allocates before it fills"
        keys, values = self._buffers
        self.keys, self.values = keys.narrow(-2, 0, tokens), values.narrow(-2, 0, tokens)


class _PartCache(Cache):
    """Answers queries about an empty layer from a layer that holds tokens.

    Families query lengths and mask sizes at a fixed layer, mostly 0, which may be empty in a part.
    A layer with full attention is preferred, since a sliding window drops tokens.
    """

    def _held(self, layer_idx: int) -> int:
        if not isinstance(self.layers[layer_idx], EmptyCacheLayer):
            return layer_idx
        held = [i for i, layer in enumerate(self.layers) if hasattr(layer, "get_seq_length")]
        full = [i for i in held if not getattr(self.layers[i], "is_sliding", False)]
        if not held:
            raise UnsupportedModel(_NO_COUNT)
        return (full or held)[0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens so far."""
        return int(super().get_seq_length(self._held(layer_idx)))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys for a query of `query_length` tokens."""
        length, offset = super().get_mask_sizes(query_length, self._held(layer_idx))
        return length, offset


class PartDynamicCache(_PartCache, DynamicCache):
    """A growing cache of a part."""


class PartStaticCache(_PartCache, StaticCache):
    """A cache of a part with a fixed capacity."""


def part_cache(
    config: PretrainedConfig, held_blocks: Collection[int], max_length: int | None
) -> Cache:
    """A KV cache for a part.

    Args:
        config: The unsplit model's config.
        held_blocks: Indices, in the unsplit model, of the part's blocks.
        max_length: The fixed capacity in tokens; a growing cache if None.

    Raises:
        UnsupportedModel: No held block has attention, so no layer counts the tokens.
    """
    if max_length is None:
        cache: Any = PartDynamicCache(config=config)
        growing: Any = GrowingLayer
        # Only plain layers: subclasses have a sliding window or a state of another kind.
        cache.layers = [growing() if type(i) is DynamicLayer else i for i in cache.layers]
    else:
        cache = PartStaticCache(config=config, max_cache_len=max_length)
    cache.layers = [
        layer if i in held_blocks else EmptyCacheLayer() for i, layer in enumerate(cache.layers)
    ]
    if not any(hasattr(layer, "get_seq_length") for layer in cache.layers):
        raise UnsupportedModel(f"{config.model_type}: {_NO_COUNT}")
    part: Cache = cache
    return part


def croppable_tokens(config: PretrainedConfig) -> float:
    """The most tokens that a growing cache of the unsplit model may hold and still be cropped.

    Infinite if all blocks keep all keys and values, and 0 if a block keeps other states.
    """
    most = math.inf
    for layer in PartDynamicCache(config=config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            most = min(most, layer.sliding_window - 1)
        elif type(layer) is not DynamicLayer:
            return 0
    return most


def remote_of(cache: Cache) -> RemoteCache:
    """The trunk's cache in the client's."""
    return next(layer.remote for layer in cache.layers if isinstance(layer, RemoteSlot))


def adopt(cache: Cache, layers: Sequence[Any]) -> None:
    """Make a cache of transformers one of a part, in place, since its owner will use it.

    Args:
        cache: A `DynamicCache` or a `StaticCache`.
        layers: The layers that it gets, as those of `part_cache`.
    """
    cache.layers = list(layers)
    cache.__class__ = PartStaticCache if isinstance(cache, StaticCache) else PartDynamicCache
