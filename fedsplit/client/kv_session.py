"""The client's handle for a KV cache at the trunk, with the hidden states that were sent to it.

Shapes: B sequences, T tokens, D hidden width. The operations of a cache in transformers (reorder,
repeat, select, crop, reset) are applied here immediately. They reach the trunk with the next
tokens, as the number of tokens and the sequences to continue from. A copy reaches it with its own
first tokens, as the session whose keys and values the trunk copies. If the trunk loses a cache,
all hidden states are sent again from here as one prompt, so the generated tokens are the same as
without the loss. Where the rotary tables depend on the largest position of a pass, the prompt is
sent in pieces that get the same tables as before.
"""

import itertools
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsplit.client.autograd import without_gradient
from fedsplit.client.precision import autocast_on
from fedsplit.client.sent_tokens import SentTokens
from fedsplit.errors import ProtocolError, SessionLost
from fedsplit.wire import messages as m

_REPLAYS = 6
"""How often a lost cache is sent again for the same tokens."""


class TrunkCache:
    """One generation at a trunk; implements `fedsplit.model.kv_cache.RemoteCache`.

    Args:
        new_session: Returns a session for a cache; the session is not open yet.
        cache_tokens: The capacity of every sequence in tokens, or 0 for a cache that grows.
        stateless: Whether keys and values travel with every request and are kept here.
        tables: Returns a key of the rotary tables of a pass, for its largest position.
    """

    def __init__(
        self,
        new_session: "Callable[[], CacheSession]",
        cache_tokens: int,
        *,
        stateless: bool,
        tables: Callable[[int], Hashable],
    ) -> None:
        self._new_session = new_session
        self._cache_tokens = cache_tokens
        self._stateless = stateless
        self._tables = tables
        self._session = new_session()
        self._source = NO_SOURCE
        self._must_replay = False
        self._record_past = False
        self._autocast = ""
        self._sent = SentTokens()
        self._mask_BT: Tensor | None = None
        self._rows_B: Tensor | None = None
        self._entries: dict[int, tuple[Tensor, Tensor]] = {}
        self.num_tokens = 0
        # A finalizer may run in any thread at any time, so it only queues the session for closing.
        weakref.finalize(self, self._session.abandon)

    def carry(
        self, hidden_BTD: Tensor, mask_BT: Tensor | None, positions_BT: Tensor | None
    ) -> Tensor:
        """The trunk's output for the next tokens, which the cache then holds.

        Args:
            hidden_BTD: Hidden states of the new tokens.
            mask_BT: The attention mask over cached and new tokens; None if it is all ones.
            positions_BT: Position ids of the new tokens; None if they count on from the cached.

        Raises:
            ProtocolError: The mask does not fit. A backward through the output raises it too.
            FedsplitError: The trunk refused, or could not be reached.
        """
        past, (B, T, _) = self.num_tokens, hidden_BTD.shape
        self._autocast = autocast_on(hidden_BTD.device)
        if past and B != self._sent.num_sequences:
            raise ProtocolError(
                f"{B} sequences came for a cache of {self._sent.num_sequences}; make a new cache"
            )
        if mask_BT is not None and tuple(mask_BT.shape) != (B, past + T):
            raise ProtocolError(
                f"attention_mask has shape {tuple(mask_BT.shape)}, but {B} sequences of {past} "
                f"cached and {T} new tokens need ({B}, {past + T})"
            )
        if mask_BT is not None and bool(mask_BT.all()):
            mask_BT = None
        if not self._matches_past(mask_BT):
            # The cached keys and values were computed with another mask.
            self._must_replay = True
        if positions_BT is None:
            positions_BT = torch.arange(past, past + T).expand(B, T)
        # On the CPU, where the wire needs them; they are kept for a replay and must not change.
        out_BTD = self._exchange(
            hidden_BTD.detach().cpu(),
            None if mask_BT is None else mask_BT.cpu(),
            positions_BT.expand(B, T).cpu(),
        )
        out_BTD = out_BTD.to(hidden_BTD.device)
        if torch.is_grad_enabled() and hidden_BTD.requires_grad:
            reason = "no gradient passes through a KV cache at a trunk; train with use_cache=False"
            out_BTD = without_gradient(out_BTD, hidden_BTD, reason)
        return out_BTD

    @property
    def num_bytes(self) -> int:
        """Bytes of what is kept here for the trunk's cache."""
        entries = (tensor for both in self._entries.values() for tensor in both)
        return self._sent.num_bytes + sum(tensor.nbytes for tensor in entries)

    def abandon(self) -> None:
        """Have the session closed before the next one is opened, without waiting until then."""
        self._must_replay = True
        self._session.abandon()

    # --- fedsplit.model.kv_cache.RemoteCache ----------------------------------------------------

    def reset(self) -> None:
        """Remove all tokens."""
        self._sent.clear()
        self._entries = {}
        self._mask_BT = self._rows_B = None
        self.num_tokens, self._must_replay = 0, True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; as in transformers, their number may be negative."""
        removed = min(abs(tokens_to_remove), self.num_tokens)
        if not removed:
            return
        kept = self.num_tokens - removed
        if not kept:
            self.reset()
            return
        self._sent.crop(removed)
        if self._mask_BT is not None:
            self._mask_BT = self._mask_BT[:, :kept]
        for block, kv in self._entries.items():
            # A sliding window has dropped the entries that the shorter cache would need.
            self._must_replay |= kv[0].shape[2] < self.num_tokens
            self._entries[block] = (kv[0][:, :, :-removed], kv[1][:, :, :-removed])
        self.num_tokens = kept

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the sequences in another order."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if self.num_tokens:
            self._select(torch.arange(self._sent.num_sequences).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the sequences."""
        self._select(indices)

    def activate_past_recording(self) -> None:
        """Have the trunk keep entries outside of a sliding window, so that `crop` can go back."""
        self._record_past = True

    def __deepcopy__(self, memo: dict[int, Any]) -> "TrunkCache":
        """An independent generation that continues from the same tokens.

        The trunk copies its keys and values at the first request of the copy. If it has lost or
        changed them by then, the copy is sent as one prompt.
        """
        copy = TrunkCache(
            self._new_session, self._cache_tokens, stateless=self._stateless, tables=self._tables
        )
        if not self._stateless:
            copy._source = self._source if self._session.is_new else self._session.last_call
        copy._must_replay, copy._record_past = self._must_replay, self._record_past
        copy._sent, copy._entries = self._sent.copy(), dict(self._entries)
        copy._mask_BT, copy._rows_B = self._mask_BT, self._rows_B
        copy.num_tokens = self.num_tokens
        return copy

    # --- requests -----------------------------------------------------------------------------

    def _select(self, rows_B: Tensor) -> None:
        if not self.num_tokens:
            return
        rows_B = rows_B.cpu()
        # Selections are composed until the next request, which carries one for all of them.
        self._rows_B = rows_B if self._rows_B is None else self._rows_B[rows_B]
        self._sent.select(rows_B)
        if self._mask_BT is not None:
            self._mask_BT = self._mask_BT[rows_B]
        for block, (keys_BHTE, values_BHTE) in self._entries.items():
            self._entries[block] = keys_BHTE[rows_B], values_BHTE[rows_B]

    def _matches_past(self, mask_BT: Tensor | None) -> bool:
        """Whether the mask over the cached tokens equals the one that they were sent with."""
        if not self.num_tokens:
            return True
        ours, theirs = self._mask_BT, mask_BT
        if theirs is not None:
            theirs = theirs[:, : self.num_tokens].cpu()
        if ours is None or theirs is None:
            one = theirs if ours is None else ours
            return one is None or bool(one.all())
        return torch.equal(ours.bool(), theirs.bool())

    def _exchange(self, hidden_BTD: Tensor, mask_BT: Tensor | None, positions_BT: Tensor) -> Tensor:
        tokens = hidden_BTD.shape[1]
        for _ in range(_REPLAYS):
            try:
                reply = self._send(hidden_BTD, mask_BT, positions_BT)
                break
            except SessionLost:
                self._session.lost()
                self._must_replay = True
            except BaseException:
                # The request may or may not have changed the cache at the trunk.
                self._must_replay = True
                raise
        else:  # the last attempt raises its SessionLost
            reply = self._send(hidden_BTD, mask_BT, positions_BT)
        self._rows_B, self._must_replay, self._source = None, False, NO_SOURCE
        self._sent.append(hidden_BTD, positions_BT)
        self._mask_BT = mask_BT
        self.num_tokens += tokens
        return reply.trunk_out_BTD

    def _send(
        self, hidden_BTD: Tensor, mask_BT: Tensor | None, positions_BT: Tensor
    ) -> m.GenerateReply:
        past, rows_B = self.num_tokens, None if self._stateless else self._rows_B
        tokens, pieces = hidden_BTD.shape[1], [(hidden_BTD, positions_BT)]
        self._session.open_if_closed(self._cache_tokens)
        source = self._source if self._session.is_new else NO_SOURCE
        is_missing = self._session.is_new and not self._stateless and source == NO_SOURCE
        if self._must_replay or is_missing:
            # All tokens again; keys and values are computed anew.
            self._entries = {}
            past, rows_B, source = 0, None, NO_SOURCE
            pieces = list(self._joined([*self._sent.pieces(), *pieces]))
        for piece_BTD, own_BT in pieces:
            reply = self._send_piece(piece_BTD, mask_BT, own_BT, past, tokens, rows_B, source)
            past += piece_BTD.shape[1]
        return reply

    def _joined(self, pieces: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Join the pieces that have the same rotary tables."""
        for _, group in itertools.groupby(pieces, lambda each: self._tables(int(each[1].max()))):
            hidden, positions = zip(*group, strict=True)
            yield torch.cat(hidden, dim=1), torch.cat(positions, dim=1)

    def _send_piece(
        self,
        hidden_BTD: Tensor,
        mask_BT: Tensor | None,
        positions_BT: Tensor,
        past: int,
        logits_to_keep: int,
        rows_B: Tensor | None,
        source: "CacheSource",
    ) -> m.GenerateReply:
        session, call = self._session.next_call()
        tokens = hidden_BTD.shape[1]
        default_BT = torch.arange(past, past + tokens).expand_as(positions_BT)
        first = 0 if self._stateless else past
        new_mask_BT = None if mask_BT is None else mask_BT[:, first : past + tokens]
        if new_mask_BT is not None and bool(new_mask_BT.all()):
            new_mask_BT = None
        request = m.GenerateRequest(
            session=session,
            call=call,
            past=past,
            logits_to_keep=min(logits_to_keep, tokens),
            smashed_BTD=hidden_BTD,
            rows_B=rows_B,
            attention_mask_BT=new_mask_BT,
            position_ids_BT=None if torch.equal(positions_BT, default_BT) else positions_BT,
            record_past=self._record_past,
            stateless=self._stateless,
            entries=self._entries_to_send(),
            autocast=self._autocast,
            source=source.session,
            source_call=source.call,
        )
        reply = self._session.exchange(request)
        self._add_entries(reply)
        return reply

    def _entries_to_send(self) -> tuple[m.KVCacheEntry, ...]:
        return tuple(
            m.KVCacheEntry(block=block, keys_BHTE=keys_BHTE, values_BHTE=values_BHTE)
            for block, (keys_BHTE, values_BHTE) in self._entries.items()
        )

    def _add_entries(self, reply: m.GenerateReply) -> None:
        for entry in reply.entries:
            kv = entry.keys_BHTE, entry.values_BHTE
            if before := self._entries.get(entry.block):
                kv = torch.cat((before[0], kv[0]), dim=2), torch.cat((before[1], kv[1]), 2)
            self._entries[entry.block] = kv


@dataclass(frozen=True, slots=True)
class CacheSource:
    """The session that a copy continues from, and its last call at the time of the copy."""

    session: str
    call: int


NO_SOURCE = CacheSource("", 0)
"""The source of a cache that is no copy."""


class CacheSession:
    """A session of a client that generates; it is opened at its first use, and again after a loss.

    Args:
        open: Opens a session with a capacity in tokens; returns its name.
        exchange: Sends a request and returns its reply.
        forget: Called with the name of a session that the trunk has lost.
        abandoned: A list that receives the names of sessions to close.
    """

    def __init__(
        self,
        open: Callable[[int], str],
        exchange: Callable[[m.GenerateRequest], m.GenerateReply],
        forget: Callable[[str], None],
        abandoned: list[str],
    ) -> None:
        self.is_new = True
        self._open = open
        self._exchange = exchange
        self._forget = forget
        self._abandoned = abandoned
        self._name = ""
        self._call = 0

    def open_if_closed(self, cache_tokens: int) -> None:
        """Open the session, unless it is open."""
        if not self._name:
            self._name = self._open(cache_tokens)
            self.is_new, self._call = True, 0

    @property
    def last_call(self) -> CacheSource:
        """The session's name, and the number of its last call."""
        return CacheSource(self._name, self._call - 1)

    def next_call(self) -> tuple[str, int]:
        """The session's name and the number of its next call."""
        self._call += 1
        return self._name, self._call - 1

    def exchange(self, request: m.GenerateRequest) -> m.GenerateReply:
        """Send a request of this session; return its reply."""
        reply = self._exchange(request)
        self.is_new = False
        return reply

    def lost(self) -> None:
        """Note that the trunk has lost the session."""
        self._forget(self._name)
        self._name = ""

    def abandon(self) -> None:
        """Queue the session to be closed before the next one is opened."""
        if self._name:
            self._abandoned.append(self._name)
        self._name = ""


def drained(names: list[str]) -> Iterator[str]:
    """Remove and yield names until none is left; other threads may add and remove some."""
    while names:
        try:
            name = names.pop()
        except IndexError:  # another thread has taken the last one
            return
        yield name
