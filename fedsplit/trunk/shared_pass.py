"""One pass of the trunk for many sessions, which share all operations except attention.

Shapes: B sequences, N tokens of all sessions, T tokens, H heads, E width of a head, D hidden width.
All tokens pass through norms, projections and feed-forwards as one long sequence. In attention each
session has its own cache, mask and length (selective batching; Yu et al. 2022, "Orca: A
Distributed Serving System for Transformer-Based Generative Models", OSDI). So nothing is padded,
and each session attends exactly as in a pass of its own.
"""

import inspect
import logging
import sys
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fedsplit.model.acceleration import autocast_to
from fedsplit.model.dryrun import FAMILY_ERRORS
from fedsplit.model.rope import by_length, tables_of
from fedsplit.model.stage import TrunkPart
from fedsplit.trunk.kv_cache import attends_only

log = logging.getLogger(__name__)

_NAME = "fedsplit_shared"
# The trial allows rounding, since larger products are summed in another order. A family that mixes
# sessions differs by far more.
_TOLERANCE = 1e-3
_TRIAL = ((3, 5), (1, 2), (1, 1))
"""The tokens of the trial's two sessions in each pass."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Segment:
    """The next tokens of one session.

    `past` tokens are in its cache already. The mask covers these and the new ones. `autocast` is
    the precision of its matrix products; empty for that of the weights.
    """

    hidden_BTD: Tensor
    attention_mask_BT: Tensor | None
    position_ids_BT: Tensor | None
    past: int
    cache: Any
    autocast: str = ""

    @property
    def largest_position(self) -> int:
        """The largest position of the tokens."""
        if self.position_ids_BT is not None:
            return int(self.position_ids_BT.max())
        return self.past + self.hidden_BTD.shape[1] - 1


class SharedPass:
    """Runs segments of several sessions in one pass, if the trunk's family allows it.

    A trial with two random sessions decides it, at the first pass of several sessions. If the
    family does not allow it, each session has a pass of its own. Sessions share a pass only if
    their rotary tables and their precision are the same.

    Args:
        trunk: The trunk part, on its device.
    """

    def __init__(self, trunk: TrunkPart) -> None:
        self._trunk = trunk
        self._is_possible: bool | None = None

    def __call__(self, segments: Sequence[Segment]) -> list[Tensor]:
        """Return the trunk's output for each segment, and append the segments to their caches."""
        if len(segments) == 1 or not self._possible():
            return [self._alone(segment) for segment in segments]
        groups: dict[Hashable, list[int]] = {}
        for place, segment in enumerate(segments):
            key = segment.autocast, self._tables(segment)
            groups.setdefault(key, []).append(place)
        outs: dict[int, Tensor] = {}
        for places in groups.values():
            group = [segments[place] for place in places]
            own = self._together(group) if len(group) > 1 else [self._alone(group[0])]
            outs.update(zip(places, own, strict=True))
        return [outs[place] for place in range(len(segments))]

    def _tables(self, segment: Segment) -> Hashable:
        """Return a key of the segment's rotary tables; it is the same if they never differ."""
        config = self._trunk.config
        return tables_of(config, segment.largest_position) if by_length(config) else ()

    def _possible(self) -> bool:
        if self._is_possible is None:
            self._is_possible = self._passes_trial()
            if not self._is_possible:
                log.warning(
                    "%s cannot serve several sessions in one pass; they take turns",
                    self._trunk.family.__name__,
                )
        return self._is_possible

    def _alone(self, segment: Segment) -> Tensor:
        return self._run(
            segment.autocast,
            segment.hidden_BTD,
            attention_mask_BT=segment.attention_mask_BT,
            position_ids_BT=segment.position_ids_BT,
            cache=segment.cache,
        )

    def _run(self, autocast: str, hidden_BTD: Tensor, **options: Any) -> Tensor:
        with autocast_to(autocast, hidden_BTD.device):
            out_BTD = self._trunk.run(hidden_BTD, **options)
        # Under autocast some families return the lower precision; the wire has the weights' dtype.
        return out_BTD.to(hidden_BTD.dtype)

    def _together(self, segments: Sequence[Segment]) -> list[Tensor]:
        config = self._trunk.config
        name = config._attn_implementation
        cache = _BatchedKVCache(segments, config, self._attention_of(name))
        hidden_1ND = torch.cat([_flat(segment.hidden_BTD) for segment in segments], dim=1)
        positions_1N = torch.cat([_flat(_positions(segment)) for segment in segments], dim=1)
        # The registry of transformers replaces attention in every family, without code per family.
        ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
        config._attn_implementation = _NAME
        _CURRENT.cache = cache
        try:
            out_1ND = self._run(
                segments[0].autocast,
                hidden_1ND,
                position_ids_BT=positions_1N,
                cache=cache,
            )
        finally:
            config._attn_implementation = name
            _CURRENT.cache = None
        sizes = [segment.hidden_BTD.shape[:2] for segment in segments]
        outs = out_1ND.split([rows * tokens for rows, tokens in sizes], dim=1)
        return [out.view(rows, tokens, -1) for out, (rows, tokens) in zip(outs, sizes, strict=True)]

    def _takes_positions(self) -> bool:
        plan, trunk = self._trunk.plan, self._trunk
        backbone: Any = trunk.get_submodule(plan.backbone) if plan.backbone else trunk.family
        return "position_ids" in inspect.signature(backbone.forward).parameters

    def _attention_of(self, name: str) -> Callable[..., Any]:
        """Return the attention function that the family was loaded with."""
        if name in ALL_ATTENTION_FUNCTIONS:
            return ALL_ATTENTION_FUNCTIONS[name]  # type: ignore[no-any-return]
        # "eager" is not in the registry: each family's file has its own.
        module = sys.modules[self._trunk.family.__module__]
        return module.eager_attention_forward  # type: ignore[no-any-return]

    def _passes_trial(self) -> bool:
        """Return whether two random sessions have the same output in one pass as in two."""
        trunk, kinds = self._trunk, set(getattr(self._trunk.config, "layer_types", None) or ())
        # In one sequence, the place of a token is not its position, so positions must be passed.
        if not attends_only(trunk.new_cache()) or not self._takes_positions():
            return False
        if kinds - {"full_attention", "sliding_attention"}:
            return False
        try:
            alone_1ND = self._trial_output(
                lambda segments: [self._alone(each) for each in segments]
            )
            together_1ND = self._trial_output(self._together)
        except FAMILY_ERRORS as exc:
            log.info("the trial of a shared pass failed", exc_info=exc)
            return False
        difference = float((alone_1ND - together_1ND).abs().max() / alone_1ND.abs().max())
        return difference <= (_TOLERANCE if alone_1ND.dtype == torch.float32 else 30 * _TOLERANCE)

    def _trial_output(self, run: Callable[[list[Segment]], list[Tensor]]) -> Tensor:
        """Return the output of three passes of two random sessions, which are always the same."""
        # A generator of its own, so that the trial does not change the process's random numbers.
        device, generator = self._trunk.device, torch.Generator().manual_seed(0)
        caches, past = [self._trunk.new_cache() for _ in range(2)], [0, 0]
        first = 0, self._far_position()
        outs = []
        # Prompts, then a token beside a piece of a prompt, then single tokens.
        for lengths in _TRIAL:
            segments = [
                Segment(
                    hidden_BTD=torch.randn(
                        1, tokens, self._trunk.config.hidden_size, generator=generator
                    ).to(device, self._trunk.dtype),
                    attention_mask_BT=None,
                    position_ids_BT=torch.arange(tokens, device=device)[None] + begin + before,
                    past=before,
                    cache=cache,
                )
                for tokens, begin, before, cache in zip(lengths, first, past, caches, strict=True)
            ]
            past = [before + tokens for before, tokens in zip(past, lengths, strict=True)]
            outs += run(segments)
        return torch.cat(outs, dim=1)

    def _far_position(self) -> int:
        """Return the first position of the trial's second session."""
        # As far from the first session as the model's positions allow, to find what depends on
        # the largest position of a pass. Sessions with different rotary tables share no pass.
        config = self._trunk.config
        positions = getattr(config, "max_position_embeddings", None) or 0
        return 0 if by_length(config) else max(0, positions - sum(own for _, own in _TRIAL))


class _BatchedKVCache(Cache):
    """The caches of several sessions as one, which the family stores keys and values into."""

    def __init__(
        self, segments: Sequence[Segment], config: Any, attention: Callable[..., Any]
    ) -> None:
        super().__init__(layers=segments[0].cache.layers)
        self._attention = attention
        self._segments = segments
        self._sizes = [segment.hidden_BTD.shape[:2].numel() for segment in segments]
        self._layer = 0
        self._masks = [_Masks(segment, config) for segment in segments]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Note the block, and store nothing: `attend` updates the cache of each session."""
        self._layer = layer_idx
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0; shared operations do not use the length."""
        return 0

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        """Return the attention of each session over its own cache, as [1, N, H, E]."""
        outs = []
        own = zip(*(x.split(self._sizes, dim=2) for x in (query, key, value)), strict=True)
        for segment, masks, states in zip(self._segments, self._masks, own, strict=True):
            rows, tokens = segment.hidden_BTD.shape[:2]
            query_BHTE, *new = (_of_rows(x, rows, tokens) for x in states)
            layer = segment.cache.layers[self._layer]
            mask = masks.of(layer, query.device)
            keys, values = layer.update(*new)
            out_BTHE, _ = self._attention(module, query_BHTE, keys, values, mask, **kwargs)
            outs.append(_flat(out_BTHE))
        return torch.cat(outs, dim=1)


class _Masks:
    """The masks of one session in this pass, made by the helpers that families use."""

    def __init__(self, segment: Segment, config: Any) -> None:
        # Made before any block runs, because a block's update of the cache changes its length.
        self._masks: dict[bool, Any] = {}
        windows = {getattr(layer, "is_sliding", False) for layer in segment.cache.layers}
        for sliding in windows:
            make = create_sliding_window_causal_mask if sliding else create_causal_mask
            self._masks[sliding] = make(
                config=config,
                inputs_embeds=segment.hidden_BTD,
                attention_mask=segment.attention_mask_BT,
                past_key_values=segment.cache,
                position_ids=segment.position_ids_BT,
            )

    def of(self, layer: Any, device: torch.device) -> Any:
        """Return the mask for a block with this cache layer, on the block's device."""
        mask = self._masks[getattr(layer, "is_sliding", False)]
        return None if mask is None else mask.to(device)


class _Current(threading.local):
    # An attention function gets no cache. Several trunks of a process each have their own thread.
    cache: _BatchedKVCache | None = None


_CURRENT = _Current()


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    cache = _CURRENT.cache
    assert cache is not None, "a config names this function only while there is a cache"
    return cache.attend(module, query, key, value, kwargs), None


def _of_rows(x_1HNE: Tensor, rows: int, tokens: int) -> Tensor:
    """Return [1, H, B * T, E] as [B, H, T, E]."""
    if rows == 1:
        return x_1HNE
    heads, width = x_1HNE.shape[1], x_1HNE.shape[3]
    return x_1HNE.view(heads, rows, tokens, width).transpose(0, 1)


def _flat(x: Tensor) -> Tensor:
    """Return [B, T, ...] as [1, B * T, ...]."""
    return x.reshape(1, -1, *x.shape[2:])


def _positions(segment: Segment) -> Tensor:
    if segment.position_ids_BT is not None:
        return segment.position_ids_BT
    rows, tokens = segment.hidden_BTD.shape[:2]
    first = torch.arange(segment.past, segment.past + tokens, device=segment.hidden_BTD.device)
    return first.expand(rows, tokens)
