"""Draft tokens in `generate` of a part: those that no assistant model makes, and after a cache.

Shapes: B sequences, T tokens.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PretrainedConfig
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.configuration_utils import GenerationMode


@runtime_checkable
class Drafter(Protocol):
    """Makes draft tokens; `generate(assistant_model=drafter)` verifies them.

    Attributes:
        config: The model's config; `generate` compares its vocabulary with the model's.
    """

    config: PretrainedConfig

    def new_text(self, max_length: int) -> CandidateGenerator:
        """Return the generator of drafts for a text of at most so many tokens."""


class TakesDrafter:
    """A base of the client's part, whose `generate` takes a `Drafter` as its `assistant_model`."""

    def _get_candidate_generator(
        self,
        generation_config: GenerationConfig,
        *args: Any,
        assistant_model: Any = None,
        **options: Any,
    ) -> CandidateGenerator:
        """Return the source of drafts; an override of transformers' hook."""
        if isinstance(assistant_model, Drafter):
            return assistant_model.new_text(generation_config.max_length)
        family: Any = super()
        found: CandidateGenerator = family._get_candidate_generator(
            generation_config, *args, assistant_model=assistant_model, **options
        )
        return found


def restore_mask(
    config: GenerationConfig, inputs: dict[str, Any], mode: Any, rows: int, device: torch.device
) -> None:
    """Put back the mask that `generate` drops if it is all ones, for a text after a cache."""
    if mode != GenerationMode.ASSISTED_GENERATION or inputs.get("attention_mask") is not None:
        return
    cache, length = inputs.get("past_key_values"), getattr(config, "_mask_length", 0)
    # Its length tells whether the text has the tokens of the cache too.
    if isinstance(cache, Cache) and cache.get_seq_length() and length:
        inputs["attention_mask"] = torch.ones(rows, length, dtype=torch.long, device=device)


def new_tokens_only(input_ids_BT: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `prepare_inputs_for_generation` after the tokens, for new ones only.

    In the first pass with drafts, transformers runs all tokens, also those that the cache of an
    earlier `generate` holds.
    """
    cache, mask_BT = inputs.get("past_key_values"), inputs.get("attention_mask")
    past = cache.get_seq_length() if isinstance(cache, Cache) else 0
    # A text without the cached tokens is shorter than its mask.
    has_all = mask_BT is not None and mask_BT.shape[1] == input_ids_BT.shape[1]
    if past and has_all and inputs.get("next_sequence_length", 1) is None:
        return {**inputs, "next_sequence_length": input_ids_BT.shape[1] - past}
    return inputs
