"""Sessions that generate: their KV caches, and the passes that serve many of them at once.

Shapes: B sequences, T tokens, D hidden width. Sessions join and leave between passes (continuous
batching; Yu et al. 2022, "Orca", OSDI): a pass takes the next token of every session that waits
and pieces of prompts beside them, so that a long prompt does not stall the others. Belongs to
the engine's thread.
"""

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedsplit.errors import FedsplitError, ProtocolError, SessionLost, TooLarge
from fedsplit.model.kv_cache import capacity
from fedsplit.model.stage import TrunkPart
from fedsplit.spec import GenerationSpec
from fedsplit.trunk.call import Call
from fedsplit.trunk.guard import require_finite
from fedsplit.trunk.kv_cache import (
    SequenceCache,
    appended,
    attends_only,
    check_entries,
    cut_to,
    filled,
    num_bytes,
    num_bytes_of,
    select_rows,
)
from fedsplit.trunk.shared_pass import Segment, SharedPass
from fedsplit.wire.messages import GenerateReply, GenerateRequest, KVCacheEntry

log = logging.getLogger(__name__)

_CAREFUL_PASSES = 64
"""Passes of one session each, after one of several broke: whoever it was breaks its own."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Pending:
    """A call at work: what is left of its input, and what has come out."""

    call: Call
    kept: SequenceCache
    left_BTD: Tensor
    since: float
    out: list[Tensor] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Sequences."""
        return self.left_BTD.shape[0]

    @property
    def tokens_left(self) -> int:
        """Tokens of a sequence that are still to be taken in."""
        return self.left_BTD.shape[1]


class Generation:
    """The caches of a trunk's sessions, and its passes.

    Args:
        trunk: The trunk part, on its device.
        spec: Budgets.
        clock: Seconds that do not run backwards.
    """

    def __init__(self, trunk: TrunkPart, spec: GenerationSpec, clock: Callable[[], float]) -> None:
        self._trunk = trunk
        self._spec = spec
        self._clock = clock
        self._device = next(trunk.parameters()).device
        self._shared = SharedPass(trunk)
        self._kept: dict[str, SequenceCache] = {}
        self._waiting: dict[str, _Pending] = {}
        self._awaited: set[str] = set()
        self._in_pass: list[_Pending] = []
        self._careful = 0

    @property
    def num_bytes(self) -> int:
        """Keys and values of all sessions."""
        return sum(kept.num_bytes for kept in self._kept.values())

    def open(self, client: str, session: str, cache_tokens: int) -> None:
        """Begin a session whose cache grows, or has room for `cache_tokens` in a sequence."""
        self._kept[session] = SequenceCache(
            client=client,
            cache_tokens=cache_tokens,
            cache=self._new_cache(cache_tokens),
            used=self._clock(),
        )

    def forget(self, session: str) -> None:
        """Drop all that is kept for a session."""
        self._kept.pop(session, None)
        self._awaited.discard(session)
        if pending := self._waiting.pop(session, None):
            pending.call.future.set_exception(SessionLost(f"session {session} was closed"))

    def drop_idle(self) -> None:
        """Drop sessions that nobody has used for `generation.ttl_s`."""
        oldest = self._clock() - self._spec.ttl_s
        for session in [name for name, kept in self._kept.items() if kept.used < oldest]:
            # The name of a session is a secret that lets its holder in: it is never logged.
            client = self._kept[session].client
            log.info("a cache of %s was idle for %g s and is dropped", client, self._spec.ttl_s)
            self.forget(session)

    def add(self, call: Call) -> None:
        """Have a request take part in the next passes.

        Raises:
            SessionLost: The cache that it continues is not there.
            FedsplitError: The request is refused; nothing was changed.
        """
        session, request = call.session, call.request
        require_finite(request.smashed_BTD, "smashed_BTD")
        kept = self._brought(request) if request.stateless else self._found(session, request)
        kept.used = self._clock()
        self._waiting[session] = _Pending(
            call=call,
            kept=kept,
            left_BTD=request.smashed_BTD.to(self._device),
            since=kept.used,
        )

    def due_in(self) -> float:
        """Seconds until a pass should begin; infinite if nobody waits."""
        if not self._waiting:
            return math.inf
        if self._awaited <= self._waiting.keys() or any(a.out for a in self._waiting.values()):
            return 0.0
        first = min(pending.since for pending in self._waiting.values())
        return max(0.0, first + self._spec.max_queue_delay_s - self._clock())

    def run_pass(self) -> None:
        """Take in the next tokens of who waits, and answer those who are through."""
        shares = self._shares()
        self._in_pass = [pending for pending, _ in shares]
        segments = [self._next_piece(pending, tokens) for pending, tokens in shares]
        if self._trunk.training:
            self._trunk.train(False)
        with torch.no_grad():
            outputs = self._shared(segments)
        self._awaited = set()
        for pending, segment, out_BTD in zip(self._in_pass, segments, outputs, strict=True):
            self._take_in(pending, segment, out_BTD)
        self._make_room({pending.call.session for pending in self._in_pass})

    def broke(self, failure: Exception) -> None:
        """Drop the caches that a pass broke off in, and tell who was in it.

        Of several it is not known whose fault it was: they come again, and go one by one.
        """
        several = len(self._in_pass) > 1
        self._careful = _CAREFUL_PASSES if several else self._careful
        for pending in self._in_pass:
            self._waiting.pop(pending.call.session, None)
            self._kept.pop(pending.call.session, None)
            lost = SessionLost("the pass of this session and others failed; send its tokens again")
            if not pending.call.future.done():
                pending.call.future.set_exception(lost if several else failure)

    def refuse_all(self, why: FedsplitError) -> None:
        """Tell everybody who waits why nothing will come."""
        for pending in self._waiting.values():
            pending.call.future.set_exception(why)
        self._waiting.clear()

    # --- a request ----------------------------------------------------------------------------

    def _brought(self, request: GenerateRequest) -> SequenceCache:
        """The cache that a stateless request brings."""
        check_entries(request.entries, request.past, self._probe)
        mask_BT = request.attention_mask_BT
        return SequenceCache(
            cache=filled(self._new_cache(0), request.entries, request.past, self._probe),
            tokens=request.past,
            rows=request.smashed_BTD.shape[0],
            mask_BT=None if mask_BT is None else mask_BT[:, : request.past].to(self._device),
        )

    def _found(self, session: str, request: GenerateRequest) -> SequenceCache:
        """What the session keeps, as the request wants to find it."""
        kept = self._kept.get(session)
        if kept is None:
            raise SessionLost(f"the cache of session {session} is gone; send its tokens again")
        if request.past > kept.tokens:
            raise SessionLost(
                f"session {session} holds {kept.tokens} tokens, not the {request.past} that this "
                "request continues; send its tokens again"
            )
        self._check_room(kept, request)
        if request.past == 0:
            if kept.tokens:
                self.open(kept.client, session, kept.cache_tokens)
                kept = self._kept[session]
            kept.rows = request.smashed_BTD.shape[0]
        else:
            cut_to(kept, request.past)
            if request.rows_B is not None:
                select_rows(kept, request.rows_B.to(self._device))
        if kept.rows != request.smashed_BTD.shape[0]:
            raise SessionLost(
                f"session {session} holds {kept.rows} sequences, and {request.smashed_BTD.shape[0]}"
                " came; send its tokens again"
            )
        if request.record_past:
            kept.cache.activate_past_recording()
        return kept

    def _check_room(self, kept: SequenceCache, request: GenerateRequest) -> None:
        """Refuse what the session's cache has no room for, before any is taken."""
        rows, tokens = request.smashed_BTD.shape[:2]
        tokens += request.past
        if kept.cache_tokens and tokens > kept.cache_tokens:
            raise ProtocolError(
                f"{tokens} tokens for a cache that was opened with room for {kept.cache_tokens}"
            )
        room = kept.cache_tokens or tokens
        if rows * room > self._spec.session_tokens:
            raise TooLarge(
                f"{rows} sequences of {room} tokens were asked for; a session of this trunk holds "
                f"at most {self._spec.session_tokens} (generation.session_tokens)"
            )
        needed = rows * num_bytes_of(self._probe, kept.cache_tokens or capacity(tokens))
        if needed > self._spec.cache_bytes:
            raise TooLarge(
                f"this session's cache would take {needed} bytes; all sessions of this trunk may "
                f"take {self._spec.cache_bytes} (generation.cache_bytes)"
            )

    @functools.cached_property
    def _probe(self) -> Any:
        """The cache of one made-up token."""
        cache = self._new_cache(0)
        like = next(self._trunk.parameters())
        with torch.no_grad():
            self._trunk.run(like.new_zeros(1, 1, self._trunk.config.hidden_size), cache=cache)
        return cache

    def _new_cache(self, cache_tokens: int) -> Any:
        return self._trunk.new_cache(cache_tokens or None)

    # --- a pass -------------------------------------------------------------------------------

    def _shares(self) -> list[tuple[_Pending, int]]:
        """Whose turn it is, and for how many tokens: all single tokens, and pieces of prompts."""
        room = self._spec.chunk_tokens
        shares = []
        waiting = list(self._waiting.values())
        if self._careful:
            self._careful -= 1
            waiting = waiting[:1]
        for pending in waiting:
            tokens = pending.tokens_left
            if tokens > 1:
                if room <= 0:
                    continue
                if attends_only(pending.kept.cache):
                    tokens = min(tokens, max(1, room // pending.rows))
                room -= tokens * pending.rows
            shares.append((pending, tokens))
        return shares

    def _next_piece(self, pending: _Pending, tokens: int) -> Segment:
        request, kept = pending.call.request, pending.kept
        begin = request.smashed_BTD.shape[1] - pending.tokens_left
        end = begin + tokens
        mask_BT = request.attention_mask_BT
        if mask_BT is not None and request.stateless:
            mask_BT = mask_BT[:, request.past :]
        kept.grow_mask(None if mask_BT is None else mask_BT[:, begin:end].to(self._device), tokens)
        positions_BT = request.position_ids_BT
        piece_BTD = pending.left_BTD[:, :tokens]
        pending.left_BTD = pending.left_BTD[:, tokens:]
        return Segment(
            hidden_BTD=piece_BTD,
            attention_mask_BT=kept.mask_BT,
            position_ids_BT=(
                None if positions_BT is None else positions_BT[:, begin:end].to(self._device)
            ),
            past=kept.tokens,
            cache=kept.cache,
        )

    def _take_in(self, pending: _Pending, segment: Segment, out_BTD: Tensor) -> None:
        kept, request = pending.kept, pending.call.request
        kept.tokens += segment.hidden_BTD.shape[1]
        kept.used = self._clock()
        pending.out.append(out_BTD)
        if pending.tokens_left:
            return
        del self._waiting[pending.call.session]
        entries: tuple[KVCacheEntry, ...] = ()
        if request.stateless:
            entries = appended(kept.cache, request.smashed_BTD.shape[1])
        else:
            kept.num_bytes = num_bytes(kept.cache)
        self._awaited.add(pending.call.session)
        out_BTD = pending.out[0] if len(pending.out) == 1 else torch.cat(pending.out, dim=1)
        reply_BTD = out_BTD[:, -request.logits_to_keep :].contiguous().cpu()
        pending.call.future.set_result(GenerateReply(trunk_out_BTD=reply_BTD, entries=entries))

    def _make_room(self, busy: set[str]) -> None:
        """Drop who was used least recently until the caches fit the budget."""
        over = self.num_bytes - self._spec.cache_bytes
        idle = sorted((kept.used, name) for name, kept in self._kept.items())
        for _, session in sorted(idle, key=lambda each: each[1] in busy):
            if over <= 0 or len(self._kept) == 1:
                return
            over -= self._kept[session].num_bytes
            log.info("a cache of %s makes room for others", self._kept[session].client)
            if pending := self._waiting.pop(session, None):
                pending.call.future.set_exception(
                    SessionLost("others needed the room of this cache")
                )
            self._kept.pop(session)
            self._awaited.discard(session)
