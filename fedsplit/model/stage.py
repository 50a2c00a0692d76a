"""The client's part and the trunk of a split model, as pipeline stages of the family's class.

A part is an instance of the family's own class. Pass-throughs replace the modules of the other
part. The family's code still handles names, block indices, rotary tables, masks and mixtures of
experts, so a part's state dict is a subset of the unsplit model's.

Shapes: B batch, T tokens, D width.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS
from transformers.initialization import no_init_weights

from fedsplit.errors import ConfigError, UnsupportedModel
from fedsplit.model.backbone import client_cache, crossing_class, crossing_forward
from fedsplit.model.drafting import TakesDrafter, new_tokens_only, restore_mask
from fedsplit.model.kv_cache import RemoteCache, part_cache
from fedsplit.model.manifest import CLIENT, TRUNK
from fedsplit.model.part_files import save_part
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
from fedsplit.model.peft_loading import WholeAdaptersOnly
from fedsplit.model.plan import Plan
from fedsplit.model.rope import forget_lengths

P = TypeVar("P", bound="Part")

AUXILIARY = "auxiliary"
"""The name of the bottom's auxiliary head; see `fedsplit.model.auxiliary`."""


class Part(WholeAdaptersOnly, PreTrainedModel):
    """The base of both parts: a family's model without the modules of the other part.

    `part_class` makes the concrete classes.

    Attributes:
        family: The family's class.
        plan: The assignment of the family's modules to parts.
        trunk_blocks: The indices of the blocks between the cuts.
        identity: The digests of the weights that the part came from, and of its adapter
            (`fedsplit.model.identity`); empty if they are not known.
    """

    family: ClassVar[type[Any]]
    plan: ClassVar[Plan]
    trunk_blocks: ClassVar[range]

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        # The loader builds the unsplit model here on the meta device, so it takes no memory and has
        # no values. torch initializes tensors of that device in Python, which is slow.
        with no_init_weights():
            super().__init__(config, *args, **kwargs)
        self.identity: dict[str, str] = {}
        # Read before modules are removed, to find ties between the parts.
        ties = dict(self.all_tied_weights_keys)
        self._remove_foreign(cast(nn.ModuleList, self.get_submodule(self.plan.blocks)))
        self._keep_ties(ties)
        forget_lengths(self)
        # A source may also hold the other part's tensors. Missing tensors are still reported.
        self._keys_to_ignore_on_load_unexpected = {".*"}

    def save_pretrained(  # type: ignore[override]  # a part takes fewer options
        self, save_directory: Any, **options: Any
    ) -> None:
        """Write the part to a directory for `load_part`; transformers refuses to load it.

        The Trainer resumes from it. `fedsplit.model.part_files.save_part` lists the options.
        """
        save_part(
            self, CLIENT if isinstance(self, ClientPart) else TRUNK, save_directory, **options
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles, which cannot find a class that was made for one cut."""
        kind = ClientPart if isinstance(self, ClientPart) else TrunkPart
        return _without_state, (kind, self.family, self.plan, self.trunk_blocks), self.__dict__

    @property
    def held_blocks(self) -> tuple[int, ...]:
        """Indices, in the unsplit model, of the blocks that this part holds."""
        raise NotImplementedError

    def place_of(self, module: str) -> str:
        """The place of a module: "bottom", "trunk" or "top"."""
        prefix = f"{self.plan.blocks}."
        if module.startswith(prefix):
            index = int(module[len(prefix) :].split(".")[0])
            early, late = index < self.trunk_blocks.start, index >= self.trunk_blocks.stop
            return "bottom" if early else "top" if late else "trunk"
        names = (*self.plan.before, AUXILIARY)
        is_before = any(f"{module}.".startswith(f"{name}.") for name in names)
        return "bottom" if is_before else "top"

    def holds(self, module: str) -> bool:
        """Whether this part holds the module of this name."""
        return (self.place_of(module) == "trunk") == isinstance(self, TrunkPart)

    def _remove_foreign(self, blocks: nn.ModuleList) -> None:
        raise NotImplementedError

    def _keep_ties(self, ties: dict[str, str]) -> None:
        # Parameters under all names, since a tied one has several.
        names = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        for target, source in ties.items():
            if (target in names) != (source in names):
                raise UnsupportedModel(
                    f"{self.family.__name__}: '{target}' and '{source}' are tied across the cut"
                )
        self.ties = {t: s for t, s in ties.items() if t in names}
        # A copy, since the loader may empty it.
        self.all_tied_weights_keys = dict(self.ties)
        # Otherwise transformers would tie parameters that the part does not have.
        if not self.all_tied_weights_keys:
            self._tied_weights_keys = {}

    def _pass_through(
        self, kind: type[PassThroughBlock], blocks: nn.ModuleList, index: int
    ) -> None:
        blocks[index] = kind(blocks[index], self.plan.returns_tuple)


class TrunkPart(Part):
    """The blocks between the cuts: its input is the smashed data, its output the trunk output."""

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
        """Run the trunk's blocks.

        Args:
            smashed_BTD: Hidden states, the output of the bottom.
            attention_mask_BT: 1 for a token, 0 for padding; it covers all tokens in the cache too.
            position_ids_BT: Required if the client has them (left padding).
            cache: A cache from `new_cache`, in generation.

        Returns:
            Hidden states [B, T, D] for the top.
        """
        named: dict[str, Any] = {
            # Only its shape, dtype and device matter, since TrunkEntry returns the values. Some
            # families write into it, so it is not the smashed data itself.
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
        """Call the part; this is the `carry` that `connect` takes."""
        out_BTD: Tensor = self(smashed_BTD, attention_mask_BT, position_ids_BT, cache)
        return out_BTD

    def new_cache(self, max_length: int | None = None) -> Cache:
        """A KV cache for the trunk, growing or of `max_length` tokens."""
        return part_cache(self.config, self.held_blocks, max_length)


class ClientPart(TakesDrafter, Part):
    """Bottom and top in one model of the family's class, with a `Remote` layer between them.

    It is used as the family's class: `model(ids, labels=labels).loss.backward()`, `generate`.
    """

    @property
    def held_blocks(self) -> tuple[int, ...]:
        """The blocks before and after the trunk."""
        return tuple(i for i in range(self.plan.num_blocks) if i not in self.trunk_blocks)

    @property
    def remote(self) -> Remote:
        """The layer that replaces the trunk."""
        remote = self.get_submodule(f"{self.plan.blocks}.{self.trunk_blocks.start}")
        assert isinstance(remote, Remote), "made in _remove_foreign"
        return remote

    def _remove_foreign(self, blocks: nn.ModuleList) -> None:
        for i in self.trunk_blocks:
            self._pass_through(
                Remote if i == self.trunk_blocks.start else PassThroughBlock, blocks, i
            )
        for name in self._backbones():
            module = self.get_submodule(name)
            kind: Any = type(module)
            inside = self.plan.blocks.removeprefix(f"{name}.")
            module.__class__ = crossing_class(kind, inside, self.trunk_blocks)

    def _backbones(self) -> Iterator[str]:
        """The backbone, and the modules in it that contain the blocks."""
        pieces = self.plan.blocks.split(".")
        for depth in range(1, len(pieces)):
            name = ".".join(pieces[:depth])
            if f"{name}.".startswith(f"{self.plan.backbone}." if self.plan.backbone else ""):
                yield name

    def new_cache(self, max_length: int | None = None) -> Cache:
        """A KV cache for client and trunk, growing or of `max_length` tokens.

        Raises:
            ConfigError: The family has no cache of a fixed length.
        """
        if max_length is not None and self._reads_mask_length:
            raise ConfigError(
                f"{self.family.__name__} computes ALiBi from the length of the attention mask, so "
                "it has no static cache in a split model; use the default one"
            )
        return client_cache(self.config, self.held_blocks, self.remote, max_length)

    @property
    def _reads_mask_length(self) -> bool:
        has_method = hasattr(self.get_submodule(self.plan.backbone), "build_alibi_tensor")
        return has_method or bool(getattr(self.config, "alibi", False))

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Put a cache for client and trunk into `model_kwargs`; an override of transformers' hook.

        Raises:
            ConfigError: A split model has no cache of the kind that `generation_config` names.
        """
        if generation_config.assistant_early_exit is not None:
            raise ConfigError(
                f"assistant_early_exit={generation_config.assistant_early_exit}: the client cannot "
                "end a forward at a block of the trunk; use prompt_lookup_num_tokens or an "
                "assistant_model"
            )
        # `generate` would compile the forward for a static cache, and the trunk may be remote.
        generation_config.disable_compile = True
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            family: Any = super()
            family._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            restore_mask(generation_config, model_kwargs, generation_mode, batch_size, self.device)
            return
        kind = generation_config.cache_implementation
        is_static = kind in ALL_STATIC_CACHE_IMPLEMENTATIONS
        if not is_static and kind not in (None, "dynamic"):
            raise ConfigError(f"cache_implementation={kind}: a split model has dynamic and static")
        longest = max(max_cache_length, generation_config.max_cache_len or 0)
        cache = self.new_cache(longest if is_static else None)
        # In assisted generation, rejected tokens are cropped, also from sliding windows.
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache

    @staticmethod
    def create_masks_for_generate(
        config: PretrainedConfig, inputs_embeds: Tensor, attention_mask: Tensor, **kwargs: Any
    ) -> Tensor:
        """The 2-D mask unchanged; a 4-D mask would fit the client's blocks only."""
        return attention_mask

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse `generate_batch` and what it is made of; an override of transformers'.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "generate_batch keeps all keys and values in pages of this process, and the trunk's "
            "are elsewhere; call generate() with a padded batch, or from several threads or "
            "clients: the trunk's server batches them"
        )


def connect(
    client: ClientPart,
    carry: Carry,
    new_remote_cache: Callable[[int | None], RemoteCache] | None = None,
) -> None:
    """Connect the client's `Remote` layer to a trunk.

    Args:
        client: The part from `build_client`.
        carry: `carry(hidden_BTD, attention_mask_BT=, position_ids_BT=, cache=) -> hidden_BTD`
            with autograd, such as `TrunkPart.run`. Mask, positions and cache may be None.
        new_remote_cache: `new_remote_cache(max_length) -> RemoteCache`, for generation; by
            default the `new_cache` of `carry`, which a `RemoteTrunk` has.
    """
    own = getattr(carry, "new_cache", _keeps_no_cache)
    client.remote.connection = TrunkConnection(carry=carry, new_cache=new_remote_cache or own)


def _keeps_no_cache(max_length: int | None) -> RemoteCache:
    raise ConfigError("this trunk keeps no KV cache; generate with use_cache=False")


def part_class(
    kind: type[P], family: type[PreTrainedModel], plan: Plan, trunk_blocks: range
) -> type[P]:
    """A subclass of the family's class that is one part of it.

    It keeps the family's name and module: transformers and peft use them as keys of tables.
    """
    body: dict[str, Any] = {
        "__module__": family.__module__,
        "family": family,
        "plan": plan,
        "trunk_blocks": trunk_blocks,
    }
    if issubclass(kind, ClientPart) and not plan.backbone:
        body["forward"] = crossing_forward(family, plan.blocks, trunk_blocks)
    if issubclass(kind, ClientPart) and hasattr(family, "prepare_inputs_for_generation"):
        body["prepare_inputs_for_generation"] = _with_cache(family)
    return cast(type[P], type(family.__name__, (kind, family), body))


def _with_cache(family: Any) -> Callable[..., dict[str, Any]]:
    """The family's method, with a cache for client and trunk where the family drops its cache.

    phi3 does so where its rotary tables change, to compute all keys and values again.
    """
    prepare = family.prepare_inputs_for_generation

    # generate() inspects the arguments.
    @functools.wraps(prepare)
    def prepare_inputs_for_generation(
        self: ClientPart, input_ids: Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        kwargs = new_tokens_only(input_ids, kwargs)
        inputs: dict[str, Any] = prepare(self, input_ids, *args, **kwargs)
        if kwargs.get("past_key_values") is not None and inputs.get("past_key_values") is None:
            inputs["past_key_values"] = self.new_cache()
        return inputs

    return prepare_inputs_for_generation


def _without_state(
    kind: type[P], family: type[PreTrainedModel], plan: Plan, trunk_blocks: range
) -> P:
    cls = part_class(kind, family, plan, trunk_blocks)
    return cls.__new__(cls)
