"""The requests that wait for a pass of generation, and those of them that run next.

Shapes: B sequences, T tokens, D hidden width.
"""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PretrainedConfig

from fedsplit.model.rope import by_length, tables_of
from fedsplit.trunk.call import Call
from fedsplit.trunk.kv_cache import SequenceCache, attends_only, last_entries, num_bytes
from fedsplit.wire.messages import GenerateReply, KVCacheEntry


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

    def is_short(self, tokens: int) -> bool:
        """Return whether a token of each sequence is left, or at most `tokens` tokens in all."""
        return self.tokens_left == 1 or self.rows * self.tokens_left <= tokens

    def reply(self) -> GenerateReply:
        """Return the reply, once all tokens have run, and note the bytes of the cache."""
        request, cache = self.call.request, self.sequences.cache
        entries: tuple[KVCacheEntry, ...] = ()
        if request.stateless:
            sent_BTD = request.smashed_BTD
            entries = last_entries(cache, sent_BTD.shape[1], sent_BTD.dtype)
        else:
            self.sequences.num_bytes = num_bytes(cache)
        out_BTD = self.out[0] if len(self.out) == 1 else torch.cat(self.out, dim=1)
        reply_BTD = out_BTD[:, -request.logits_to_keep :].contiguous().cpu()
        return GenerateReply(trunk_out_BTD=reply_BTD, entries=entries)


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
    waiting: Collection[Pending],
    *,
    short: int,
    prompt_tokens: int,
    room_bytes: int,
    can_divide: Callable[[Pending], bool],
) -> list[tuple[Pending, int]]:
    """Return the requests of a pass, each with the number of tokens that it runs.

    Args:
        waiting: The requests, the most urgent first.
        short: Requests of so many tokens always run.
        prompt_tokens: The tokens of the other requests that the pass runs; 0 if it runs none.
        room_bytes: The bytes of all caches of the pass.
        can_divide: Whether a prompt may run in pieces.
    """
    # Each client with prompts has the same part of `prompt_tokens`.
    clients = {each.call.client for each in waiting if not each.is_short(short)}
    least = min(1, prompt_tokens)
    room = {client: max(least, prompt_tokens // len(clients)) for client in clients}
    shares: list[tuple[Pending, int]] = []
    for pending in waiting:
        client, tokens, is_short = pending.call.client, pending.tokens_left, pending.is_short(short)
        # The first one always runs, so each gets its turn.
        if shares and pending.num_bytes > room_bytes:
            continue
        if pending.out or is_short or room[client] > 0:
            room_bytes -= pending.num_bytes
        if not is_short:
            if room[client] <= 0:
                continue
            if can_divide(pending):
                tokens = min(tokens, max(1, room[client] // pending.rows))
            room[client] -= tokens * pending.rows
        shares.append((pending, tokens))
    return shares


def can_divide(pending: Pending, config: PretrainedConfig) -> bool:
    """Return whether the output does not depend on where the rest of a prompt is divided."""
    # States other than keys and values may depend on it.
    if not attends_only(pending.sequences.cache):
        return False
    if not by_length(config):
        return True
    positions_BT = pending.call.request.position_ids_BT
    if positions_BT is None:
        first = pending.sequences.tokens
        last = first + pending.tokens_left - 1
    else:
        left_BT = positions_BT[:, -pending.tokens_left :]
        first, last = int(left_BT[:, 0].max()), int(left_BT.max())
    # A piece of a pass with other rotary tables would get tables of its own.
    return tables_of(config, first) == tables_of(config, last)
