"""The settings of generation: a trunk's budgets of memory and time for its sessions."""

from dataclasses import dataclass
from typing import Annotated

from fedsplit.spec.checks import DURATION, MAX_SECONDS, AtLeast, Positive, check_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """Budgets of generation at the trunk; they change no number of training.

    A pass of the trunk processes one token of every waiting session, and some tokens of prompts.

    Attributes:
        session_tokens (tokens): The most that a session holds: the prompts and answers of all its
            sequences.
        cache_bytes (bytes): The most that the caches of all sessions hold. Over this limit, the
            least recently used session is dropped; its client replays it.
        ttl_s (seconds): The time after which a session that is not used is dropped.
        chunk_tokens (tokens): The most tokens of prompts that a pass processes. It processes fewer
            while other sessions decode.
        max_queue_delay_s (seconds): The longest wait of a pass, after the first token was sent,
            for the next token of all sessions of the last pass.
        stateless_bytes (bytes): The largest size of a message that carries a cache.
    """

    session_tokens: Annotated[int, Positive()] = 16384
    cache_bytes: Annotated[int, Positive()] = 2 << 30
    ttl_s: Annotated[float, DURATION] = 600.0
    chunk_tokens: Annotated[int, Positive()] = 256
    max_queue_delay_s: Annotated[float, AtLeast(0, most=MAX_SECONDS)] = 0.01
    stateless_bytes: Annotated[int, Positive()] = 256 << 20

    def __post_init__(self) -> None:
        check_fields(self, "generation")
