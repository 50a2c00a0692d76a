"""What a trunk spends on sessions that generate."""

from dataclasses import dataclass

from fedsplit.spec.checks import at_least, positive


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """Budgets of generation at the trunk; they change no number of training.

    One session holds at most `session_tokens` tokens, prompts and answers of all its sequences,
    and the caches of all sessions `cache_bytes`; beyond that the one that was used least recently
    is dropped, as is one that nobody used for `ttl_s` seconds. A client replays a dropped session.

    A pass of the trunk takes one token of every session that waits, and beside them at most
    `chunk_tokens` of prompts. It begins when everybody of the pass before has asked again, or
    `max_queue_delay_s` seconds after the first. `stateless_bytes` bounds a message that carries a
    cache.
    """

    session_tokens: int = 16384
    cache_bytes: int = 2 << 30
    ttl_s: float = 600.0
    chunk_tokens: int = 256
    max_queue_delay_s: float = 0.01
    stateless_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        for name in ("session_tokens", "cache_bytes", "ttl_s", "chunk_tokens", "stateless_bytes"):
            positive(f"generation.{name}", getattr(self, name))
        at_least("generation.max_queue_delay_s", self.max_queue_delay_s, 0)
