"""The KV caches of requests that were answered, for further requests with the same beginning.

A conversation comes whole with each of its requests, so most of a request is what the one before
has left in its cache. All caches are those of one client of the trunk.

Shapes: B sequences, T tokens.
"""

import copy
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsplit.client.kv_session import TrunkCache
from fedsplit.model import ClientPart
from fedsplit.model.kv_cache import remote_of
from fedsplit.serve.reuse import CacheReuse, keep_first

MOST_CACHES = 32
"""The most idle caches, each of which has a session at the trunk."""

_LEAST_COPIED = 16
"""The fewest tokens that are copied of a cache; fewer are computed again as quickly."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Idle:
    """An idle cache, its tokens, and how many of them were the prompt of its request."""

    cache: Any
    tokens_T: Tensor
    prompt: int
    num_bytes: int


class IdleCaches:
    """Lends a cache for each request, and keeps it afterwards; several threads may use it.

    Args:
        model: The client's model, connected to its trunk.
        most_bytes: The most bytes of all idle caches on this machine. Those that were used least
            recently are dropped.
    """

    def __init__(self, model: ClientPart, most_bytes: int) -> None:
        self._model = model
        self._most_bytes = most_bytes
        self._reuse = CacheReuse(model.config)
        # The least recently used one first.
        self._idle: list[_Idle] = []
        self._lock = threading.Lock()

    def take(self, ids_T: Tensor) -> tuple[Any, int]:
        """Return a cache for a prompt, and how many of the prompt's first tokens it holds.

        If the prompt goes on from the one of an idle cache, it gets this cache. If both only begin
        with the same tokens, such as a system prompt, it gets a copy of these, so that the other
        conversation can go on from its own cache.
        """
        with self._lock:
            common = [self._reuse.common(each.tokens_T, ids_T) for each in self._idle]
            # Of several, the most recently used one.
            held, at = max(((held, at) for at, held in enumerate(common)), default=(0, 0))
            if not held:
                return self._model.new_cache(), 0
            found = self._idle.pop(at)
            # All but its last token, because an equal prompt has that token computed again.
            if held >= found.prompt - 1:
                cache = found.cache
            else:
                self._idle.append(found)
                if held < _LEAST_COPIED:
                    return self._model.new_cache(), 0
                cache = copy.deepcopy(found.cache)
        keep_first(cache, held)
        return cache, held

    def give(self, cache: Any, text_BT: Tensor, prompt: int) -> None:
        """Keep the cache of texts that were generated, with the first of them.

        Args:
            cache: A cache from `take`.
            text_BT: The prompt and the answer, for each sequence of the cache.
            prompt: How many of these tokens are the prompt.
        """
        tokens = cache.get_seq_length()
        if len(text_BT) > 1:
            cache.reorder_cache(torch.tensor([0]))
        idle = _Idle(
            cache=cache,
            tokens_T=text_BT[0, :tokens].cpu(),
            prompt=prompt,
            num_bytes=_bytes_of(cache),
        )
        dropped = []
        with self._lock:
            self._idle.append(idle)
            while self._idle and self._is_over():
                dropped.append(self._idle.pop(0))
        for each in dropped:
            self.drop(each.cache)

    def drop(self, cache: Any) -> None:
        """Have the session of a cache closed, which is not used any more."""
        _trunk_cache(cache).abandon()

    def _is_over(self) -> bool:
        num_bytes = sum(each.num_bytes for each in self._idle)
        return len(self._idle) > MOST_CACHES or num_bytes > self._most_bytes


def _bytes_of(cache: Any) -> int:
    """The bytes of the client's keys and values, and of what was sent to the trunk."""
    states = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    own = sum(each.nbytes for each in states if isinstance(each, Tensor))
    return own + _trunk_cache(cache).num_bytes


def _trunk_cache(cache: Any) -> TrunkCache:
    remote = remote_of(cache)
    assert isinstance(remote, TrunkCache), "the model is connected to a trunk"
    return remote
