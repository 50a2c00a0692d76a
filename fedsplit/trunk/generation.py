"""Generation: the KV caches of the trunk's sessions, and the passes that serve many sessions.

Shapes: B sequences, T tokens, D hidden width. Sessions join and leave between passes (continuous
batching; Yu et al. 2022, "Orca", OSDI). A pass runs the next token of every session that waits,
and a piece of each prompt. Only the engine's thread uses this module.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedsplit.errors import FedsplitError, ProtocolError, SessionLost, TooLarge
from fedsplit.model.kv_cache import capacity
from fedsplit.model.stage import TrunkPart
from fedsplit.model.tensor_parallel import num_ranks
from fedsplit.spec import GenerationSpec
from fedsplit.telemetry.events import CacheState
from fedsplit.trunk.call import Call
from fedsplit.trunk.guard import require_finite
from fedsplit.trunk.kv_cache import (
    SequenceCache,
    check_entries,
    continued_by,
    copy_tokens,
    crop,
    fill,
    first_to_go,
    has_fixed_caches,
    num_bytes_of,
    select_rows,
)
from fedsplit.trunk.pass_budget import PromptBudget
from fedsplit.trunk.pass_queue import Pending, can_divide, in_turn
from fedsplit.trunk.shared_pass import Segment, SharedPass
from fedsplit.wire.messages import GenerateRequest

log = logging.getLogger(__name__)

_SINGLE_PASSES = 64
"""Passes with one session each after a failed pass of several, so that only the cause fails."""

_SOON_S = 1.0
"""A session that has sent no token for as long after a pass is not about to send one."""


class Generation:
    """Holds the caches of a trunk's sessions and runs its passes.

    Args:
        trunk: The trunk part, on its device.
        spec: The budgets of caches and passes.
        clock: Seconds that do not run backwards.
        pass_s: Returns the seconds that the last pass took.

    Attributes:
        begun: The calls of the last pass that no pass before it ran in part.
        last_pass: The sessions of the last pass, and its sequences times tokens.
    """

    def __init__(
        self,
        trunk: TrunkPart,
        spec: GenerationSpec,
        clock: Callable[[], float],
        pass_s: Callable[[], float],
    ) -> None:
        self._trunk = trunk
        self._spec = spec
        self._clock = clock
        self._pass_s = pass_s
        self._pass_began = clock()
        self._budget = PromptBudget(spec.chunk_tokens)
        self._device = next(trunk.parameters()).device
        self._shared = SharedPass(trunk)
        self._caches: dict[str, SequenceCache] = {}
        self._waiting: dict[str, Pending] = {}
        self._bytes_of_row: dict[int, int] = {}
        self._awaited: set[str] = set()
        self._in_pass: list[Pending] = []
        self._single_passes_left = 0
        self._hits = self._misses = self._evictions = 0
        self.begun: list[Call] = []
        self.last_pass = 0, 0

    @property
    def cache_state(self) -> CacheState:
        """The bytes of all caches, and how often a request found its own; any thread may ask."""
        return CacheState(
            num_bytes=self.num_bytes,
            limit_bytes=self._spec.cache_bytes,
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values of all sessions; any thread may ask."""
        return sum(sequences.num_bytes for sequences in tuple(self._caches.values()))

    @property
    def most_tokens(self) -> int:
        """The tokens of the session that holds most; any thread may ask."""
        caches = tuple(self._caches.values())
        return max((each.rows * each.tokens for each in caches), default=0)

    def open(self, client: str, session: str, cache_tokens: int) -> None:
        """Open a cache of `cache_tokens` tokens per sequence; a cache of 0 grows as needed.

        Raises:
            ProtocolError: The family has no caches of a fixed size.
        """
        if cache_tokens and not self._has_fixed_caches:
            raise ProtocolError(
                f"{self._trunk.family.__name__} has no caches of a fixed size; generate without "
                "cache_implementation='static'"
            )
        self._caches[session] = SequenceCache(
            client=client,
            cache_tokens=cache_tokens,
            cache=self._new_cache(cache_tokens),
            used=self._clock(),
        )

    def forget(self, session: str) -> None:
        """Drop the state of a session, and fail its request."""
        self._lose(session, f"session {session} was closed")

    def add(self, call: Call) -> None:
        """Add a request to the next passes.

        Raises:
            SessionLost: The cache that it continues is gone.
            FedsplitError: The request is refused, and nothing was changed.
        """
        session, request = call.session, call.request
        require_finite(request.smashed_BTD, "smashed_BTD")
        if request.stateless:
            sequences = self._client_cache(request)
        else:
            sequences = self._found(session, request)
        now = self._clock()
        pending = Pending(
            call=call,
            sequences=sequences,
            left_BTD=request.smashed_BTD.to(self._device),
            since=now,
            num_bytes=max(sequences.num_bytes, self._bytes_with(sequences, request)),
        )
        # A stateless request brings a cache of its own.
        kept = self._caches.get(session, sequences)
        kept.used, kept.decodes = now, pending.is_short(self._budget.short)
        self._waiting[session] = pending

    def due_in(self) -> float:
        """Return the seconds until a pass should begin; infinite if no request waits."""
        if not self._waiting:
            return math.inf
        # The sessions of the last pass are likely to send their next token soon, or wait for a
        # person. A prompt waits for them between its pieces, so that a pass has their tokens and a
        # piece.
        waiting, ended = self._waiting.values(), self._pass_began + self._pass_s()
        first = min((each.since for each in waiting if not each.out), default=ended)
        if any(each.out for each in waiting):
            first = max(first, ended)
        if self._awaited <= self._waiting.keys() or first - ended > _SOON_S:
            return 0.0
        return max(0.0, first + self._spec.max_queue_delay_s - self._clock())

    def run_pass(self) -> None:
        """Run the next tokens of the requests that wait, and answer those that are complete."""
        shares = self._next_shares()
        self._pass_began = self._clock()
        # Stored before the pass runs, so that `fail_pass` finds it.
        self._in_pass = [pending for pending, _ in shares]
        self.begun = [each.call for each in self._in_pass if not each.out]
        self.last_pass = len(shares), sum(pending.rows * tokens for pending, tokens in shares)
        self._reserve()
        segments = [self._next_piece(pending, tokens) for pending, tokens in shares]
        if self._trunk.training:
            self._trunk.train(False)
        with torch.no_grad():
            outputs = self._shared(segments)
        for pending, segment, out_BTD in zip(self._in_pass, segments, outputs, strict=True):
            self._append_output(pending, segment, out_BTD)
        complete = [pending for pending in self._in_pass if not pending.tokens_left]
        replies = [(pending.call, pending.reply()) for pending in complete]
        self._awaited = {call.session for call, _ in replies}
        for session in self._awaited:
            del self._waiting[session]
        self._make_room()
        # Last, because each wakes a thread, which this one would wait for.
        for call, reply in replies:
            call.future.set_result(reply)

    def _reserve(self) -> None:
        """Make room for the caches of the pass, before they grow."""
        beside = 0
        for pending in self._in_pass:
            if pending.call.request.stateless:
                beside += pending.num_bytes
            else:
                pending.sequences.num_bytes = pending.num_bytes
        self._make_room(beside)

    def fail_pass(self, failure: Exception) -> None:
        """Drop the caches of a pass that failed, and fail its requests.

        If there were several, the cause is unknown. The clients repeat their requests, which then
        run one by one.
        """
        several = len(self._in_pass) > 1
        self._single_passes_left = _SINGLE_PASSES if several else self._single_passes_left
        for pending in self._in_pass:
            # Some blocks have stored the tokens and others have not, so the cache is unusable.
            self._waiting.pop(pending.call.session, None)
            self._caches.pop(pending.call.session, None)
            lost = SessionLost("the pass of this session and others failed; send its tokens again")
            if not pending.call.future.done():
                pending.call.future.set_exception(lost if several else failure)

    def refuse_all(self, why: FedsplitError) -> None:
        """Fail all requests that wait."""
        for pending in self._waiting.values():
            pending.call.future.set_exception(why)
        self._waiting.clear()

    # --- a request ----------------------------------------------------------------------------

    def _client_cache(self, request: GenerateRequest) -> SequenceCache:
        """Return a cache with the keys and values of a stateless request."""
        if num_ranks(self._trunk) > 1:  # each has other heads
            raise ProtocolError("keys and values of several ranks cannot travel; use kv=server")
        check_entries(request.entries, request.past, self._probe)
        mask_BT = request.attention_mask_BT
        return SequenceCache(
            cache=fill(self._new_cache(0), request.entries, request.past, self._probe),
            tokens=request.past,
            rows=request.smashed_BTD.shape[0],
            mask_BT=None if mask_BT is None else mask_BT[:, : request.past].to(self._device),
        )

    def _found(self, session: str, request: GenerateRequest) -> SequenceCache:
        """Return the session's cache, and count whether the tokens before the request are in it."""
        try:
            sequences = self._session_cache(session, request)
        except SessionLost:
            self._misses += 1
            raise
        self._hits += request.past > 0
        return sequences

    def _session_cache(self, session: str, request: GenerateRequest) -> SequenceCache:
        """Return the session's cache, cropped and reordered as the request asks."""
        source = continued_by(request, session, self._caches)
        sequences, rows = self._caches[session], request.smashed_BTD.shape[0]
        self._check_room(sequences, request)
        if request.past < sequences.tokens or request.rows_B is not None:
            sequences.changed_at = request.call
        if request.past == 0:
            # A new cache, because one with a window or linear attention cannot always be cropped.
            if sequences.tokens:
                self.open(sequences.client, session, sequences.cache_tokens)
                sequences = self._caches[session]
                sequences.changed_at = request.call
            sequences.rows, sequences.autocast = rows, request.autocast
        elif source is sequences:
            crop(sequences, request.past)
        else:
            source.used = self._clock()
            # If the source itself has to go, it is held here until it is copied.
            self._make_room(self._bytes_with(sequences, request))
            copy_tokens(source, request.past, into=sequences)
        if request.past and request.rows_B is not None:
            select_rows(sequences, request.rows_B.to(self._device))
        if sequences.rows != rows:
            raise SessionLost(
                f"session {session} holds {sequences.rows} sequences, but this request has {rows}; "
                "send its tokens again"
            )
        if request.record_past:
            sequences.cache.activate_past_recording()
        return sequences

    def _check_room(self, sequences: SequenceCache, request: GenerateRequest) -> None:
        """Refuse a request that the session's cache has no room for, before memory is used."""
        rows, tokens = request.smashed_BTD.shape[:2]
        tokens += request.past
        if sequences.cache_tokens and tokens > sequences.cache_tokens:
            raise ProtocolError(
                f"the request needs room for {tokens} tokens, but the session's cache was opened "
                f"with room for {sequences.cache_tokens}; make one with a larger max_length"
            )
        # A cache of fixed size takes all its memory at the first token.
        room = sequences.cache_tokens or tokens
        if rows * room > self._spec.session_tokens:
            raise TooLarge(
                f"{rows} sequences of {room} tokens were asked for; a session of this trunk holds "
                f"at most {self._spec.session_tokens}; raise generation.session_tokens at the trunk"
            )
        needed = self._bytes_with(sequences, request)
        if needed > self._spec.cache_bytes:
            raise TooLarge(
                f"this session's cache would take {needed} bytes; all sessions of this trunk may "
                f"take {self._spec.cache_bytes}; raise generation.cache_bytes at the trunk"
            )

    def _bytes_with(self, sequences: SequenceCache, request: GenerateRequest) -> int:
        """Return the bytes of a cache once it holds the tokens of a request."""
        rows, tokens = request.smashed_BTD.shape[:2]
        room = sequences.cache_tokens or capacity(request.past + tokens)
        if room not in self._bytes_of_row:
            self._bytes_of_row[room] = num_bytes_of(self._probe, room)
        return rows * self._bytes_of_row[room]

    @functools.cached_property
    def _has_fixed_caches(self) -> bool:
        return has_fixed_caches(self._trunk)

    @functools.cached_property
    def _probe(self) -> Any:
        """A cache with one token, which has the shapes and devices of the blocks' states."""
        cache, trunk = self._new_cache(0), self._trunk
        hidden_BTD = torch.zeros(1, 1, trunk.config.hidden_size, dtype=trunk.dtype)
        with torch.no_grad():
            trunk.run(hidden_BTD.to(self._device), cache=cache)
        return cache

    def _new_cache(self, cache_tokens: int) -> Any:
        return self._trunk.new_cache(cache_tokens or None)

    # --- a pass -------------------------------------------------------------------------------

    def _next_shares(self) -> list[tuple[Pending, int]]:
        """Return the requests of the next pass, each with the number of tokens that it runs."""
        self._budget.end(self._pass_s())
        waiting = in_turn(self._waiting.values())
        if self._single_passes_left:
            self._single_passes_left -= 1
            waiting = waiting[:1]
        since = self._clock() - _SOON_S
        return self._budget.shares(
            waiting,
            decoding=any(each.decodes and each.used >= since for each in self._caches.values()),
            room_bytes=self._spec.cache_bytes,
            can_divide=functools.partial(can_divide, config=self._trunk.config),
        )

    def _next_piece(self, pending: Pending, tokens: int) -> Segment:
        request, sequences = pending.call.request, pending.sequences
        begin = request.smashed_BTD.shape[1] - pending.tokens_left
        end = begin + tokens
        mask_BT = request.attention_mask_BT
        # The mask of a stateless request begins with the tokens in its cache.
        if mask_BT is not None and request.stateless:
            mask_BT = mask_BT[:, request.past :]
        piece_mask_BT = None if mask_BT is None else mask_BT[:, begin:end].to(self._device)
        sequences.grow_mask(piece_mask_BT, tokens)
        positions_BT = request.position_ids_BT
        piece_BTD = pending.left_BTD[:, :tokens]
        pending.left_BTD = pending.left_BTD[:, tokens:]
        return Segment(
            hidden_BTD=piece_BTD,
            attention_mask_BT=sequences.mask_BT,
            position_ids_BT=(
                None if positions_BT is None else positions_BT[:, begin:end].to(self._device)
            ),
            past=sequences.tokens,
            cache=sequences.cache,
            autocast=request.autocast,
        )

    def _append_output(self, pending: Pending, segment: Segment, out_BTD: Tensor) -> None:
        sequences = pending.sequences
        sequences.tokens += segment.hidden_BTD.shape[1]
        sequences.used = self._clock()
        pending.out.append(out_BTD)

    def _make_room(self, beside: int = 0) -> None:
        """Drop caches until the rest fits the budget, with `beside` bytes of other caches."""
        over = self.num_bytes + beside - self._spec.cache_bytes
        busy = {pending.call.session for pending in self._in_pass}
        while over > 0 and (session := first_to_go(self._caches, busy)):
            over -= self._caches[session].num_bytes
            self._evictions += 1
            log.info("dropped a cache of %s to make room", self._caches[session].client)
            self._lose(session, "other sessions needed the memory; send its tokens again")

    def _lose(self, session: str, why: str) -> None:
        self._caches.pop(session, None)
        self._awaited.discard(session)
        if pending := self._waiting.pop(session, None):
            pending.call.future.set_exception(SessionLost(why))
