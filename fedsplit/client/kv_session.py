"""The trunk's KV cache as its client sees it, and all that was sent to fill it.

Shapes: B sequences, T tokens, D hidden width. What transformers asks of a cache (reorder, repeat,
select, crop, reset) is done here at once, and reaches the trunk with the next tokens: as the
number of tokens and the sequences to go on from. Whatever the trunk has lost is sent again from
here, as one prompt, so a generation ends as it would have without the loss.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedsplit.client.sent_tokens import SentTokens
from fedsplit.errors import ProtocolError, SessionLost
from fedsplit.wire import messages as m

_REPLAYS = 6
"""How often what the trunk lost is sent again for the same tokens."""


class TrunkCache:
    """One generation at a trunk; implements `fedsplit.model.kv_cache.RemoteCache`.

    Args:
        new_session: Makes a session for a cache, not opened yet.
        cache_tokens: Room in every sequence, or 0 for a cache that grows.
        stateless: Keys and values travel with every request and stay here.
    """

    def __init__(
        self, new_session: "Callable[[], CacheSession]", cache_tokens: int, *, stateless: bool
    ) -> None:
        self._new_session = new_session
        self._cache_tokens = cache_tokens
        self._stateless = stateless
        self._session = new_session()
        self._has_lost = False
        self._record_past = False
        self._sent = SentTokens()
        self._mask_BT: Tensor | None = None
        self._rows_B: Tensor | None = None
        self._entries: dict[int, tuple[Tensor, Tensor]] = {}
        self.num_tokens = 0
        weakref.finalize(self, self._session.abandon)

    def carry(
        self, hidden_BTD: Tensor, mask_BT: Tensor | None, positions_BT: Tensor | None
    ) -> Tensor:
        """Have the trunk take in the next tokens; the mask is over those before them too.

        Raises:
            ProtocolError: The mask does not fit, or a gradient would be needed.
            FedsplitError: The trunk refused, or could not be reached.
        """
        if torch.is_grad_enabled() and hidden_BTD.requires_grad:
            raise ProtocolError("a KV cache is for generation: no gradient goes through it")
        past, (B, T, _) = self.num_tokens, hidden_BTD.shape
        if past and B != self._sent.num_sequences:
            raise ProtocolError(
                f"{B} sequences came for a cache of {self._sent.num_sequences}; begin another cache"
            )
        if mask_BT is not None and tuple(mask_BT.shape) != (B, past + T):
            raise ProtocolError(
                f"attention_mask of shape {tuple(mask_BT.shape)} for {B} sequences of {past} "
                f"cached and {T} new tokens"
            )
        if mask_BT is not None and bool(mask_BT.all()):
            mask_BT = None
        if not self._is_of_past(mask_BT):
            self._has_lost = True  # what is cached was made with another one
        if positions_BT is None:
            positions_BT = torch.arange(past, past + T).expand(B, T)
        out_BTD = self._exchange(
            hidden_BTD.detach().cpu(),
            None if mask_BT is None else mask_BT.cpu(),
            positions_BT.expand(B, T).cpu(),
        )
        return out_BTD.to(hidden_BTD.device)

    # --- fedsplit.model.kv_cache.RemoteCache ----------------------------------------------------

    def reset(self) -> None:
        """Forget all tokens."""
        self._sent.clear()
        self._entries = {}
        self._mask_BT = self._rows_B = None
        self.num_tokens, self._has_lost = 0, True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; as in transformers, their number comes with a minus sign."""
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
        for block, both in self._entries.items():
            # A window has forgotten what the tokens before its first one would need.
            self._has_lost |= both[0].shape[2] < self.num_tokens
            self._entries[block] = (both[0][:, :, :-removed], both[1][:, :, :-removed])
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
        """Have the trunk keep what a sliding window would forget, to be cropped."""
        self._record_past = True

    def __deepcopy__(self, memo: dict[int, Any]) -> "TrunkCache":
        """A generation that goes on from the same tokens by itself."""
        copy = TrunkCache(self._new_session, self._cache_tokens, stateless=self._stateless)
        copy._has_lost, copy._record_past = True, self._record_past
        copy._sent = self._sent.copy()
        copy._mask_BT, copy.num_tokens = self._mask_BT, self.num_tokens
        return copy

    # --- what they share ----------------------------------------------------------------------

    def _select(self, rows_B: Tensor) -> None:
        if not self.num_tokens:
            return
        rows_B = rows_B.cpu()
        self._rows_B = rows_B if self._rows_B is None else self._rows_B[rows_B]
        self._sent.select(rows_B)
        if self._mask_BT is not None:
            self._mask_BT = self._mask_BT[rows_B]
        for block, (keys_BHTE, values_BHTE) in self._entries.items():
            self._entries[block] = keys_BHTE[rows_B], values_BHTE[rows_B]

    def _is_of_past(self, mask_BT: Tensor | None) -> bool:
        """Whether the mask is, over the tokens that are cached, the one they were sent with."""
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
                self._has_lost = True
            except BaseException:
                self._has_lost = True  # who knows how far it came
                raise
        else:
            reply = self._send(hidden_BTD, mask_BT, positions_BT)
        self._rows_B, self._has_lost = None, False
        self._sent.append(hidden_BTD, positions_BT)
        self._mask_BT = mask_BT
        self.num_tokens += tokens
        return reply.trunk_out_BTD

    def _send(
        self, hidden_BTD: Tensor, mask_BT: Tensor | None, positions_BT: Tensor
    ) -> m.GenerateReply:
        tokens, past = hidden_BTD.shape[1], self.num_tokens
        session, call = self._session.next_call(self._cache_tokens)
        if self._has_lost or self._session.is_new:
            self._entries = {}
            hidden_BTD, positions_BT = self._sent.followed_by(hidden_BTD, positions_BT)
            past = 0
        counted = torch.arange(past, past + hidden_BTD.shape[1]).expand_as(positions_BT)
        new_mask_BT = mask_BT if mask_BT is None or self._stateless else mask_BT[:, past:]
        if new_mask_BT is not None and bool(new_mask_BT.all()):
            new_mask_BT = None
        request = m.GenerateRequest(
            session=session,
            call=call,
            past=past,
            logits_to_keep=tokens,
            smashed_BTD=hidden_BTD,
            rows_B=self._rows_B if past and not self._stateless else None,
            attention_mask_BT=new_mask_BT,
            position_ids_BT=None if torch.equal(positions_BT, counted) else positions_BT,
            record_past=self._record_past,
            stateless=self._stateless,
            entries=self._travelling(),
        )
        reply = self._session.exchange(request)
        self._keep(reply)
        return reply

    def _travelling(self) -> tuple[m.KVCacheEntry, ...]:
        return tuple(
            m.KVCacheEntry(block=block, keys_BHTE=keys_BHTE, values_BHTE=values_BHTE)
            for block, (keys_BHTE, values_BHTE) in self._entries.items()
        )

    def _keep(self, reply: m.GenerateReply) -> None:
        for entry in reply.entries:
            both = entry.keys_BHTE, entry.values_BHTE
            if before := self._entries.get(entry.block):
                both = torch.cat((before[0], both[0]), dim=2), torch.cat((before[1], both[1]), 2)
            self._entries[entry.block] = both


class CacheSession:
    """A session of a client that generates: opened when it is first needed, or was lost.

    Args:
        open: Opens a session for so many tokens; its name.
        exchange: Sends a request and returns its reply.
        forget: Called with the name of a session that the trunk has lost.
        abandoned: Takes the names of sessions that can be closed.
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

    def next_call(self, cache_tokens: int) -> tuple[str, int]:
        """The session's name, and the number of its next call."""
        if not self._name:
            self._name = self._open(cache_tokens)
            self.is_new, self._call = True, 0
        self._call += 1
        return self._name, self._call - 1

    def exchange(self, request: m.GenerateRequest) -> m.GenerateReply:
        """Send a request of this session."""
        reply = self._exchange(request)
        self.is_new = False
        return reply

    def lost(self) -> None:
        """Note that the trunk does not know the session any more."""
        self._forget(self._name)
        self._name = ""

    def abandon(self) -> None:
        """Have the session closed, with the next exchange that can wait."""
        if self._name:
            self._abandoned.append(self._name)
