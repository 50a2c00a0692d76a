"""The reuse of a client's KV cache for another text that begins with the same tokens."""

from typing import Any

from torch import Tensor
from transformers import Cache, PretrainedConfig

from fedsplit.model.kv_cache import croppable_tokens
from fedsplit.model.rope import tables_of


class CacheReuse:
    """Says how many tokens of a cache a text can continue from.

    Args:
        config: The config of the unsplit model.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self._config = config
        self._croppable = croppable_tokens(config)

    def common(self, held_T: Tensor, ids_T: Tensor) -> int:
        """Return the number of first tokens that a cache holds of a text.

        It is 0 if the text has to begin anew: a state of linear attention and a full sliding window
        cannot go back, and keys of other rotary tables are not those of the text. The last token of
        the text does not count, because its output is needed.

        Args:
            held_T: The tokens in the cache.
            ids_T: The tokens of the text.
        """
        most = min(len(held_T), len(ids_T) - 1)
        other_T = (held_T[:most] != ids_T[:most]).nonzero()
        common = int(other_T[0]) if len(other_T) else most
        if common < len(held_T) and len(held_T) > self._croppable:
            return 0
        last = max(len(held_T), len(ids_T)) - 1
        return common if tables_of(self._config, 0) == tables_of(self._config, last) else 0


def keep_first(cache: Cache, tokens: int) -> None:
    """Remove all but the first tokens of a cache."""
    held: Any = cache.get_seq_length()
    if removed := int(held) - tokens:
        cache.crop(-removed)
