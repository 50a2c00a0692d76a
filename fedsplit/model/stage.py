"""The two parts of a cut model, as stages of a pipeline: the family's class with pass-throughs.

A part is an instance of the family's own class. Modules of the other part pass their input through.

Names, block indices, rotary tables, masks and mixtures of experts stay the family's own, so a
part's state dict is a subset of the whole model's. Shapes: B batch, T tokens, D width.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS

from fedsplit.errors import ConfigError, UnsupportedModel
from fedsplit.model.kv_cache import RemoteCache, RemoteSlot, part_cache
from fedsplit.model.pass_through import (
    Carry,
    CutContext,
    PassThroughBlock,
    PassThroughModule,
    Remote,
    TrunkConnection,
    TrunkEntry,
    TrunkExit,
    cut_context,
)
from fedsplit.model.plan import Plan

P = TypeVar("P", bound="Part")

AUXILIARY = "auxiliary"
"""Name of a head that the bottom may train on; see `fedsplit.model.auxiliary`."""


class Part(PreTrainedModel):
    """A family's model of which only some blocks, and perhaps only they, are there.

    `part_class` makes the concrete classes; `trunk_blocks` are those between the cuts.
    """

    family: ClassVar[type[Any]]
    plan: ClassVar[Plan]
    trunk_blocks: ClassVar[range]

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        ties = dict(self.all_tied_weights_keys)
        self._remove_foreign(cast(nn.ModuleList, self.get_submodule(self.plan.blocks)))
        self._keep_ties(ties)
        # A source may hold the other part's tensors too; what is missing is checked by the loader.
        self._keys_to_ignore_on_load_unexpected = {".*"}

    @property
    def held_blocks(self) -> tuple[int, ...]:
        """Indices, in the whole model, of the blocks that this part holds."""
        raise NotImplementedError

    def place_of(self, module: str) -> str:
        """Which of bottom, trunk and top the module of this name belongs to."""
        prefix = f"{self.plan.blocks}."
        if module.startswith(prefix):
            index = int(module[len(prefix) :].split(".")[0])
            early, late = index < self.trunk_blocks.start, index >= self.trunk_blocks.stop
            return "bottom" if early else "top" if late else "trunk"
        names = (*self.plan.before, AUXILIARY)
        is_before = any(f"{module}.".startswith(f"{name}.") for name in names)
        return "bottom" if is_before else "top"

    def holds(self, module: str) -> bool:
        """Whether the module of this name is one of this part's."""
        return (self.place_of(module) == "trunk") == isinstance(self, TrunkPart)

    def _remove_foreign(self, blocks: nn.ModuleList) -> None:
        raise NotImplementedError

    def _keep_ties(self, ties: dict[str, str]) -> None:
        names = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        for target, source in ties.items():
            if (target in names) != (source in names):
                raise UnsupportedModel(
                    f"{self.family.__name__}: '{target}' and '{source}' are tied across the cut"
                )
        self.ties = {t: s for t, s in ties.items() if t in names}
        self.all_tied_weights_keys = dict(self.ties)  # the loader may empty it
        if not self.all_tied_weights_keys:
            self._tied_weights_keys = {}

    def _pass_through(
        self, kind: type[PassThroughBlock], blocks: nn.ModuleList, index: int
    ) -> None:
        blocks[index] = kind(blocks[index], self.plan.returns_tuple)


class TrunkPart(Part):
    """The blocks between the cuts: smashed data in, trunk output out."""

    @property
    def held_blocks(self) -> tuple[int, ...]:
        """The blocks between the cuts."""
        return tuple(self.trunk_blocks)

    def _remove_foreign(self, blocks: nn.ModuleList) -> None:
        last = len(blocks) - 1
        for i in set(range(len(blocks))) - set(self.trunk_blocks):
            self._pass_through(
                TrunkEntry if i == 0 else TrunkExit if i == last else PassThroughBlock, blocks, i
            )
        for name in (*self.plan.before, *self.plan.after):
            self.set_submodule(name, PassThroughModule(self.get_submodule(name)))

    def forward(
        self,
        smashed_BTD: Tensor,
        attention_mask_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Carry the hidden states through the trunk's blocks.

        Args:
            smashed_BTD: Hidden states as they leave the bottom.
            attention_mask_BT: 1 for a token, 0 for padding; over all tokens so far with a cache.
            position_ids_BT: Needed where the client has them (left padding).
            cache: One of `new_cache`, in generation.
        """
        named: dict[str, Any] = {
            # Only its shape matters, TrunkEntry brings in the values; some families write into it.
            self.plan.trunk_input: torch.zeros_like(smashed_BTD),
            "attention_mask": attention_mask_BT,
            "position_ids": position_ids_BT,
            "past_key_values": cache,
        }
        named = {name: value for name, value in named.items() if value is not None}
        if self.main_input_name == "input_ids":
            named["use_cache"] = cache is not None
        backbone = self.get_submodule(self.plan.backbone) if self.plan.backbone else super().forward
        context = CutContext(smashed_BTD=smashed_BTD)
        with cut_context(context):
            backbone(**named)
        assert context.trunk_out_BTD is not None, "TrunkExit sets it"
        return context.trunk_out_BTD

    def run(
        self,
        smashed_BTD: Tensor,
        attention_mask_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Call the part; a bound method of this shape is what `connect` takes."""
        out_BTD: Tensor = self(smashed_BTD, attention_mask_BT, position_ids_BT, cache)
        return out_BTD

    def new_cache(self, max_length: int | None = None) -> Cache:
        """KV cache of the trunk, growing or of `max_length` tokens."""
        return part_cache(self.config, self.held_blocks, max_length)


class ClientPart(Part):
    """Bottom and top in one model of the family's class, with a `Remote` layer between them.

    It is used as the family's own: `model(ids, labels=labels).loss.backward()`, `generate`.
    """

    @property
    def held_blocks(self) -> tuple[int, ...]:
        """The blocks before and after the trunk."""
        return tuple(i for i in range(self.plan.num_blocks) if i not in self.trunk_blocks)

    @property
    def remote(self) -> Remote:
        """The layer that stands in the trunk's place."""
        remote = self.get_submodule(f"{self.plan.blocks}.{self.trunk_blocks.start}")
        assert isinstance(remote, Remote), "made in _remove_foreign"
        return remote

    def _remove_foreign(self, blocks: nn.ModuleList) -> None:
        for i in self.trunk_blocks:
            self._pass_through(
                Remote if i == self.trunk_blocks.start else PassThroughBlock, blocks, i
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The family's own forward; the 2-D mask and positions reach the trunk beside it."""
        named = _by_name(self.family, self, args, kwargs)
        mask = named.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim != 2:
            raise ConfigError(
                f"attention_mask has shape {tuple(mask.shape)}; a split model takes [batch, tokens]"
            )
        context = CutContext(
            attention_mask_BT=mask,
            position_ids_BT=named.get("position_ids"),
            cache=self._remote_cache(named),
        )
        with cut_context(context):
            return super().forward(**named)

    def _remote_cache(self, named: dict[str, Any]) -> Any:
        """The trunk's side of this call's cache; makes one if the call asks for a cache."""
        takes = _signature(self.family.forward).parameters
        if named.get("past_key_values") is None:
            if not named.get("use_cache"):
                # config.use_cache would make a cache that the trunk knows nothing of.
                named.update({"use_cache": False} if "use_cache" in takes else {})
                return None
            named["past_key_values"] = self.new_cache()
        slots = getattr(named["past_key_values"], "layers", ())
        slot = slots[self.trunk_blocks.start] if len(slots) == self.plan.num_blocks else None
        if not isinstance(slot, RemoteSlot):
            raise UnsupportedModel(
                f"{self.family.__name__}: use this model's new_cache(): the trunk does not know "
                "of any other cache"
            )
        return slot.remote

    def new_cache(self, max_length: int | None = None) -> Cache:
        """KV cache of client and trunk, growing or of `max_length` tokens."""
        cache = part_cache(self.config, self.held_blocks, max_length)
        slots: list[Any] = cache.layers
        slots[self.trunk_blocks.start] = RemoteSlot(self.remote.connection.new_cache(max_length))
        return cache

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Have `generate` use a cache that reaches to the trunk, of the kind that it was asked for.

        Raises:
            ConfigError: There is no such cache of a split model.
        """
        generation_config.disable_compile = True  # what is far away cannot be
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            family: Any = super()
            family._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            return
        kind = generation_config.cache_implementation
        is_static = kind in ALL_STATIC_CACHE_IMPLEMENTATIONS
        if not is_static and kind not in (None, "dynamic"):
            raise ConfigError(f"cache_implementation={kind}: a split model has dynamic and static")
        longest = max(max_cache_length, generation_config.max_cache_len or 0)
        cache = self.new_cache(longest if is_static else None)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache

    @staticmethod
    def create_masks_for_generate(
        config: PretrainedConfig, inputs_embeds: Tensor, attention_mask: Tensor, **kwargs: Any
    ) -> Tensor:
        """Keep the mask 2-D: a 4-D one would be made from the client's blocks alone."""
        return attention_mask


def connect(
    client: ClientPart,
    carry: Carry,
    new_remote_cache: Callable[[int | None], RemoteCache] | None = None,
) -> None:
    """Give the client's `Remote` layer its trunk.

    Args:
        client: What `build_client` made.
        carry: `carry(hidden_BTD, attention_mask_BT=, position_ids_BT=, cache=) -> hidden_BTD`,
            taking part in autograd; `TrunkPart.run` is one. Absent mask and positions are None.
        new_remote_cache: `new_remote_cache(max_length) -> RemoteCache`, for generation; by
            default the `new_cache` of `carry`, which a `RemoteTrunk` has.
    """
    own = getattr(carry, "new_cache", _keeps_no_cache)
    client.remote.connection = TrunkConnection(carry=carry, new_cache=new_remote_cache or own)


def _keeps_no_cache(max_length: int | None) -> RemoteCache:
    raise ConfigError("this trunk keeps no KV cache; generate with use_cache=False")


def _by_name(
    family: type[Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All arguments of a call of the family's forward under their names."""
    signature = _signature(family.forward)
    named = dict(signature.bind_partial(model, *args, **kwargs).arguments)
    named.pop("self")
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(name, {}))
    return named


@functools.cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def part_class(
    kind: type[P], family: type[PreTrainedModel], plan: Plan, trunk_blocks: range
) -> type[P]:
    """The family's class as one part of it.

    It keeps the family's name and module, by which transformers and peft look things up.
    """
    body: dict[str, Any] = {
        "__module__": family.__module__,
        "family": family,
        "plan": plan,
        "trunk_blocks": trunk_blocks,
    }
    if issubclass(kind, ClientPart):
        # generate() and Trainer look at the arguments that forward names.
        body["forward"] = _client_forward(family)
    return cast(type[P], type(family.__name__, (kind, family), body))


def _client_forward(family: type[PreTrainedModel]) -> Callable[..., Any]:
    """A function of its own for each family, since it bears the signature of one."""

    @functools.wraps(family.forward)
    def forward(self: ClientPart, *args: Any, **kwargs: Any) -> Any:
        return ClientPart.forward(self, *args, **kwargs)

    return forward
