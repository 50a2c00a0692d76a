"""The call of a client's backbone: it crosses to the trunk, whoever calls it.

A head calls its backbone, but so do other libraries: losses that compute their own logits, reward
models, poolers. So the crossing is set up where the backbone is called, and not the model.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache
from transformers.utils.generic import ModelOutput

from fedsplit.errors import ConfigError, UnsupportedModel
from fedsplit.model.kv_cache import EmptyCacheLayer, RemoteCache, RemoteSlot, adopt, part_cache
from fedsplit.model.outputs import LayerOutputs
from fedsplit.model.pass_through import CutContext, Remote, cut_context, is_in_call

# Arguments of families that change what blocks compute, and do not reach the trunk.
_NOT_SENT = (
    "encoder_hidden_states",
    "cross_attention_states",
    "seq_idx",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
)

_INSTEAD_OF_STATIC = (
    "pass model.new_cache(max_length=...), which is a static cache at both sides, or call "
    'generate(cache_implementation="static")'
)
_INSTEAD_OF_FILLED = (
    "pass an empty DynamicCache, one that this model has returned, or its new_cache(). Prefix "
    "tuning makes such a cache; use LoRA or prompt tuning instead"
)


@functools.cache
def crossing_class(kind: Any, blocks: str, trunk_blocks: range) -> type[nn.Module]:
    """A subclass of a backbone's class whose forward crosses to the trunk.

    It keeps the class's name and module: transformers and peft use them as keys of tables.

    Args:
        kind: The family's class.
        blocks: The name of the list of blocks in the backbone.
        trunk_blocks: The indices of the trunk's blocks.
    """
    body = {
        "__module__": kind.__module__,
        "forward": crossing_forward(kind, blocks, trunk_blocks),
        # For copies and pickles, which cannot find this class by its name.
        "__reduce__": lambda self: (_without_state, (kind, blocks, trunk_blocks), self.__dict__),
    }
    made: type[nn.Module] = type(kind.__name__, (kind,), body)
    return made


def _without_state(kind: Any, blocks: str, trunk_blocks: range) -> nn.Module:
    cls = crossing_class(kind, blocks, trunk_blocks)
    return cls.__new__(cls)


def crossing_forward(kind: type[nn.Module], blocks: str, trunk_blocks: range) -> Callable[..., Any]:
    """The forward of `crossing_class`, with the signature of the family's."""
    names = tuple(inspect.signature(kind.forward).parameters)[1:]

    # generate() and Trainer inspect the arguments of a model's forward.
    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        modules = self.get_submodule(blocks)
        assert isinstance(modules, nn.ModuleList), "the plan has found it"
        crossing = _Crossing(self, list(modules), trunk_blocks)
        if is_in_call(crossing.remote):  # of a module around this one
            return kind.forward(self, *args, **kwargs)
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        return crossing.run(functools.partial(kind.forward, self), named)

    return forward


class _Crossing:
    """A call of a backbone whose trunk is elsewhere."""

    def __init__(self, backbone: Any, blocks: Sequence[nn.Module], trunk_blocks: range) -> None:
        self.backbone = backbone
        self.blocks = blocks
        self.trunk_blocks = trunk_blocks
        self.held_blocks = [i for i in range(len(blocks)) if i not in trunk_blocks]
        remote = blocks[trunk_blocks.start]
        assert isinstance(remote, Remote), "made in ClientPart._remove_foreign"
        self.remote = remote

    def run(self, forward: Callable[..., Any], named: dict[str, Any]) -> Any:
        """The output of the family's forward, with an entry for each of the model's layers."""
        self._refuse(named)
        context = CutContext(
            remote=self.remote,
            attention_mask_BT=_two_dimensional(named.get("attention_mask")),
            position_ids_BT=named.get("position_ids"),
            cache=self._given_cache(named.get("past_key_values")),
        )
        as_dict = self._setting(named, "return_dict")
        selection = self._setting(named, "output_hidden_states")
        if selection is not None:
            # transformers would count only the client's layers to find one by its index.
            named["output_hidden_states"] = bool(selection)
        with cut_context(context):
            output = forward(**{**named, "return_dict": True})
        assert isinstance(output, ModelOutput), "return_dict is set"
        is_recorded = any(output.get(name) is not None for name in ("hidden_states", "attentions"))
        if is_recorded and context.smashed_BTD is not None and context.trunk_out_BTD is not None:
            recorded = getattr(self.backbone, "_can_record_outputs", None) or {}
            layers = LayerOutputs(
                blocks=self.blocks, trunk_blocks=self.trunk_blocks, recorded=recorded
            )
            layers.complete(output, context.smashed_BTD, context.trunk_out_BTD, selection)
        made = output.get("past_key_values")
        if made is not None and context.cache is None:
            self._add_trunk(made, context)
        return output.to_tuple() if as_dict is False else output

    def _setting(self, named: dict[str, Any], name: str) -> Any:
        value = named.get(name)
        return getattr(self.backbone.config, name, None) if value is None else value

    def _refuse(self, named: dict[str, Any]) -> None:
        """Raise an error for arguments that change what the trunk's blocks compute."""
        for name in _NOT_SENT:
            if named.get(name) is not None:
                raise ConfigError(
                    f"{name} changes what the trunk's blocks compute, but only hidden states, "
                    "padding mask and positions reach the trunk; leave it out"
                )
        if self._setting(named, "output_router_logits"):
            raise ConfigError(
                "output_router_logits=True: the auxiliary loss needs the router logits of layers "
                "the client does not hold; leave it out"
            )
        is_causal = getattr(self.backbone.config, "is_causal", True)
        if named.get("is_causal") not in (None, is_causal):
            raise ConfigError(
                f"is_causal={named['is_causal']}: the trunk's attention is set by its config; "
                "leave it out"
            )

    # --- caches -------------------------------------------------------------------------------

    def _given_cache(self, cache: Any) -> RemoteCache | None:
        """The trunk's cache in the caller's cache."""
        if cache is None:
            return None
        layers = getattr(cache, "layers", ())
        first = self.trunk_blocks.start
        slot = layers[first] if len(layers) == len(self.blocks) else None
        if isinstance(slot, RemoteSlot):
            return slot.remote
        is_plain = type(cache) is DynamicCache and not cache.offloading
        if not is_plain or any(layer.is_initialized for layer in layers):
            is_static = isinstance(cache, StaticCache)
            instead = _INSTEAD_OF_STATIC if is_static else _INSTEAD_OF_FILLED
            raise UnsupportedModel(
                f"past_key_values is a {type(cache).__name__} that was made elsewhere, and the "
                f"trunk takes no keys and values for its blocks; {instead}"
            )
        own = client_cache(self.backbone.config, self.held_blocks, self.remote, None)
        adopt(cache, own.layers)
        return self._given_cache(cache)

    def _add_trunk(self, cache: Any, context: CutContext) -> None:
        """Add the trunk to a cache that the family has made in this call.

        The call was an ordinary forward, with a graph in training. The trunk gets its hidden states
        once more if the cache is used.
        """
        if not isinstance(cache, DynamicCache):
            raise UnsupportedModel(
                f"the trunk has no cache of the kind {type(cache).__name__}; pass use_cache=False"
            )
        layers: list[Any] = [
            layer if i in self.held_blocks else EmptyCacheLayer()
            for i, layer in enumerate(cache.layers)
        ]
        layers[self.trunk_blocks.start] = RemoteSlot(lambda: self.remote.filled_cache(context))
        adopt(cache, layers)


def client_cache(
    config: Any, held_blocks: Sequence[int], remote: Remote, max_length: int | None
) -> Cache:
    """A KV cache for client and trunk, growing or of `max_length` tokens."""
    cache = part_cache(config, held_blocks, max_length)
    layers: list[Any] = cache.layers
    connection = remote.connection
    layers[min(set(range(len(layers))) - set(held_blocks))] = RemoteSlot(
        lambda: connection.new_cache(max_length)
    )
    return cache


def _two_dimensional(mask: Any) -> Tensor | None:
    """The padding mask for the trunk, as integers.

    Raises:
        ConfigError: The mask is not one of padding.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        found = f"has shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else "is a dict"
        raise ConfigError(
            f"attention_mask {found}; a split model takes one of padding, [batch, tokens], from "
            "which each block makes its own"
        )
    return mask.bool().long() if mask.is_floating_point() else mask
