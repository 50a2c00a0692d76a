"""The requests that wait for a pass of generation, and those of them that run next.

Shapes: B sequences, T tokens, D hidden width.
"""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from torch import Tensor

from fedsplit.spec import GenerationSpec
from fedsplit.trunk.call import Call
from fedsplit.trunk.kv_cache import SequenceCache


@dataclass(slots=True, kw_only=True, eq=False)
class Pending:
    """A call in progress: the rest of its input, and its output so far.

    `since` is the time of its arrival, in seconds, and `num_bytes` what its cache will take.
    """

    call: Call
    sequences: SequenceCache
    left_BTD: Tensor
    since: float
    num_bytes: int
    out: list[Tensor] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """The number of sequences."""
        return self.left_BTD.shape[0]

    @property
    def tokens_left(self) -> int:
        """The number of tokens of each sequence that have not run yet."""
        return self.left_BTD.shape[1]


def in_turn(waiting: Collection[Pending]) -> list[Pending]:
    """Return requests in the order in which they run: of each client one, then another one.

    Those that have run in part are first, because their caches take memory already.

    Args:
        waiting: The requests in the order of their arrival.
    """
    before: Counter[str] = Counter()
    turns: dict[int, int] = {}
    for pending in waiting:
        turns[id(pending)] = before[pending.call.client]
        before[pending.call.client] += 1
    return sorted(waiting, key=lambda each: (not each.out, turns[id(each)]))


def shares_of(
    waiting: Collection[Pending], spec: GenerationSpec, can_divide: Callable[[Pending], bool]
) -> list[tuple[Pending, int]]:
    """Return the requests of a pass, each with the number of tokens that it runs.

    Args:
        waiting: The requests, the most urgent first.
        spec: The budgets of a pass.
        can_divide: Whether a prompt may run in pieces.
    """
    # Single tokens always run. Prompts share `chunk_tokens`, so that the pass stays short, and each
    # client has the same part of them.
    clients = {each.call.client for each in waiting if each.tokens_left > 1}
    room = {client: max(1, spec.chunk_tokens // len(clients)) for client in clients}
    room_bytes = spec.cache_bytes
    shares: list[tuple[Pending, int]] = []
    for pending in waiting:
        client, tokens = pending.call.client, pending.tokens_left
        # The first one always runs, so each gets its turn.
        if shares and pending.num_bytes > room_bytes:
            continue
        if pending.out or tokens == 1 or room[client] > 0:
            room_bytes -= pending.num_bytes
        if tokens > 1:
            if room[client] <= 0:
                continue
            if can_divide(pending):
                tokens = min(tokens, max(1, room[client] // pending.rows))
            room[client] -= tokens * pending.rows
        shares.append((pending, tokens))
    return shares
