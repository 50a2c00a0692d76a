"""The settings of generation: a trunk's budgets of memory and time for its sessions."""

from dataclasses import dataclass

from fedsplit.spec.checks import at_least, positive


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """Budgets of generation at the trunk; they change no number of training.

    One session holds at most `session_tokens` tokens: the prompts and answers of all its
    sequences. The caches of all sessions hold at most `cache_bytes` bytes; over this limit, the
    least recently used session is dropped. A session that is not used for `ttl_s` seconds is
    dropped too. A client replays a dropped session.

    A pass of the trunk processes one token of every waiting session, and at most `chunk_tokens`
    tokens of prompts. It begins when all sessions of the last pass have sent their next token, or
    `max_queue_delay_s` seconds after the first of them did. `stateless_bytes` is the largest size
    of a message that carries a cache.
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
