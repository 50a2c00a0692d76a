"""One pass of the trunk for many sessions: what is per token is shared, attention is not.

Shapes: B sequences, N tokens of all sessions, T tokens, H heads, E width of a head, D hidden width.
All tokens go through norms, projections and feed-forwards as one long sequence; in attention each
session has its own cache, mask and length (selective batching; Yu et al. 2022, "Orca: A
Distributed Serving System for Transformer-Based Generative Models", OSDI). So no session is
padded for another one, and each attends exactly as it would alone.
"""

import inspect
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fedsplit.model.dryrun import FAMILY_ERRORS
from fedsplit.model.stage import TrunkPart
from fedsplit.trunk.kv_cache import attends_only

log = logging.getLogger(__name__)

_NAME = "fedsplit_shared"
_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Segment:
    """The next tokens of one session: `past` tokens are in its cache, the mask is over all."""

    hidden_BTD: Tensor
    attention_mask_BT: Tensor | None
    position_ids_BT: Tensor | None
    past: int
    cache: Any


class SharedPass:
    """Runs segments of several sessions through a trunk at once, where its family allows it.

    Whether it does is tried on two made-up sessions when it is first needed; if not, sessions
    take turns.
    """

    def __init__(self, trunk: TrunkPart) -> None:
        self._trunk = trunk
        self._can: bool | None = None

    def __call__(self, segments: Sequence[Segment]) -> list[Tensor]:
        """The trunk's output for each segment, whose cache grows by it."""
        if len(segments) > 1 and self._possible():
            return self._together(segments)
        return [self._alone(segment) for segment in segments]

    def _possible(self) -> bool:
        if self._can is None:
            self._can = self._try()
            if not self._can:
                log.warning(
                    "%s cannot serve several sessions in one pass; they take turns",
                    self._trunk.family.__name__,
                )
        return self._can

    def _alone(self, segment: Segment) -> Tensor:
        return self._trunk.run(
            segment.hidden_BTD,
            attention_mask_BT=segment.attention_mask_BT,
            position_ids_BT=segment.position_ids_BT,
            cache=segment.cache,
        )

    def _together(self, segments: Sequence[Segment]) -> list[Tensor]:
        config = self._trunk.config
        name = config._attn_implementation
        rooms = _Rooms(segments, config, self._attention_of(name))
        hidden_1ND = torch.cat([_flat(segment.hidden_BTD) for segment in segments], dim=1)
        positions_1N = torch.cat([_flat(_positions(segment)) for segment in segments], dim=1)
        ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
        config._attn_implementation = _NAME
        _CURRENT.rooms = rooms
        try:
            out_1ND = self._trunk.run(
                hidden_1ND,
                position_ids_BT=positions_1N,
                cache=rooms,
            )
        finally:
            config._attn_implementation = name
            _CURRENT.rooms = None
        sizes = [segment.hidden_BTD.shape[:2] for segment in segments]
        outs = out_1ND.split([rows * tokens for rows, tokens in sizes], dim=1)
        return [out.view(rows, tokens, -1) for out, (rows, tokens) in zip(outs, sizes, strict=True)]

    def _takes_positions(self) -> bool:
        plan, trunk = self._trunk.plan, self._trunk
        backbone: Any = trunk.get_submodule(plan.backbone) if plan.backbone else trunk.family
        return "position_ids" in inspect.signature(backbone.forward).parameters

    def _attention_of(self, name: str) -> Callable[..., Any]:
        """The attention that the family was loaded with."""
        if name in ALL_ATTENTION_FUNCTIONS:
            return ALL_ATTENTION_FUNCTIONS[name]  # type: ignore[no-any-return]
        module = sys.modules[self._trunk.family.__module__]
        return module.eager_attention_forward  # type: ignore[no-any-return]

    def _try(self) -> bool:
        """Whether two made-up sessions come out together as they do alone."""
        trunk, kinds = self._trunk, set(getattr(self._trunk.config, "layer_types", None) or ())
        if not attends_only(trunk.new_cache()) or not self._takes_positions():
            return False
        if kinds - {"full_attention", "sliding_attention"}:
            return False
        try:
            alone_1ND = self._tried(lambda segments: [self._alone(each) for each in segments])
            together_1ND = self._tried(self._together)
        except FAMILY_ERRORS as exc:
            log.info("a shared pass failed", exc_info=exc)
            return False
        largest = float((alone_1ND - together_1ND).abs().max() / alone_1ND.abs().max())
        return largest <= (_TOLERANCE if alone_1ND.dtype == torch.float32 else 30 * _TOLERANCE)

    def _tried(self, run: Callable[[list[Segment]], list[Tensor]]) -> Tensor:
        """What comes out of three passes of two made-up sessions, always the same ones."""
        like, made = next(self._trunk.parameters()), torch.Generator().manual_seed(0)
        caches, past = [self._trunk.new_cache() for _ in range(2)], [0, 0]
        outs = []
        for lengths in ((3, 5), (1, 2), (1, 1)):
            segments = [
                Segment(
                    hidden_BTD=torch.randn(
                        1, tokens, self._trunk.config.hidden_size, generator=made
                    ).to(like),
                    attention_mask_BT=None,
                    position_ids_BT=None,
                    past=before,
                    cache=cache,
                )
                for tokens, before, cache in zip(lengths, past, caches, strict=True)
            ]
            past = [before + tokens for before, tokens in zip(past, lengths, strict=True)]
            outs += run(segments)
        return torch.cat(outs, dim=1)


class _Rooms(Cache):
    """The caches of several sessions as one: the family stores into it what is of all of them."""

    def __init__(
        self, segments: Sequence[Segment], config: Any, attention: Callable[..., Any]
    ) -> None:
        super().__init__(layers=segments[0].cache.layers)
        self._attention = attention
        self._segments = segments
        self._layer = 0
        self._masks = [_Masks(segment, config) for segment in segments]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Note the block; each session's own cache takes its part in `attend`."""
        self._layer = layer_idx
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing that is shared goes by it."""
        return 0

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        """Each session's queries over its own keys and values; [1, N, H, E]."""
        outs = []
        begin = 0
        for segment, masks in zip(self._segments, self._masks, strict=True):
            rows, tokens = segment.hidden_BTD.shape[:2]
            end = begin + rows * tokens
            mine = [_of_rows(x[:, :, begin:end], rows, tokens) for x in (query, key, value)]
            mask = masks.of(segment.cache.layers[self._layer], query.device)
            keys, values = segment.cache.update(mine[1], mine[2], self._layer)
            out_BTHE, _ = self._attention(module, mine[0], keys, values, mask, **kwargs)
            outs.append(out_BTHE.reshape(1, rows * tokens, *out_BTHE.shape[2:]))
            begin = end
        return torch.cat(outs, dim=1)


class _Masks:
    """The masks of one session in this pass, as the family's own helpers make them."""

    def __init__(self, segment: Segment, config: Any) -> None:
        self._made: dict[bool, Any] = {}
        windows = {getattr(layer, "is_sliding", False) for layer in segment.cache.layers}
        for sliding in windows:
            make = create_sliding_window_causal_mask if sliding else create_causal_mask
            self._made[sliding] = make(
                config=config,
                inputs_embeds=segment.hidden_BTD,
                attention_mask=segment.attention_mask_BT,
                past_key_values=segment.cache,
                position_ids=segment.position_ids_BT,
            )

    def of(self, layer: Any, device: torch.device) -> Any:
        """The mask for a block with such a cache, on the block's device."""
        mask = self._made[getattr(layer, "is_sliding", False)]
        return None if mask is None else mask.to(device)


class _Current(threading.local):
    rooms: _Rooms | None = None


_CURRENT = _Current()


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    rooms = _CURRENT.rooms
    assert rooms is not None, "the name of this function is set while there are rooms only"
    return rooms.attend(module, query, key, value, kwargs), None


def _of_rows(x_1HNE: Tensor, rows: int, tokens: int) -> Tensor:
    """[1, H, B * T, E] as [B, H, T, E]."""
    if rows == 1:
        return x_1HNE
    heads, width = x_1HNE.shape[1], x_1HNE.shape[3]
    return x_1HNE.view(heads, rows, tokens, width).transpose(0, 1)


def _flat(x: Tensor) -> Tensor:
    """[B, T, ...] as [1, B * T, ...]."""
    return x.reshape(1, -1, *x.shape[2:])


def _positions(segment: Segment) -> Tensor:
    if segment.position_ids_BT is not None:
        return segment.position_ids_BT
    rows, tokens = segment.hidden_BTD.shape[:2]
    first = torch.arange(segment.past, segment.past + tokens, device=segment.hidden_BTD.device)
    return first.expand(rows, tokens)
