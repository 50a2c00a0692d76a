"""What a client's backbone returns for each layer, with an entry for every layer of the model.

Shapes: B batch, T tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.utils.generic import ModelOutput
from transformers.utils.output_capturing import OutputRecorder, selected_hidden_states

from fedsplit.errors import UnsupportedModel
from fedsplit.model.pass_through import PassThrough


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOutputs:
    """The layers of a backbone of which the trunk holds some.

    transformers records hidden states and attentions by hooks on a family's modules, so the layers
    of the trunk would have no entry, and an index would refer to another layer.

    Attributes:
        blocks: The backbone's blocks; those of the trunk are pass-throughs.
        trunk_blocks: The indices of the trunk's blocks.
        recorded: The modules whose outputs transformers records, by the name of the output: the
            backbone's `_can_record_outputs`. Empty if the family collects the outputs itself.
    """

    blocks: Sequence[nn.Module]
    trunk_blocks: range
    recorded: dict[str, Any]

    def complete(
        self, output: ModelOutput, smashed_BTD: Tensor, trunk_out_BTD: Tensor, selection: Any
    ) -> None:
        """Give `hidden_states` and `attentions` an entry for every layer; the trunk's are None.

        Args:
            output: The backbone's output, which is changed.
            smashed_BTD: The input of the trunk's first block; it is a hidden state.
            trunk_out_BTD: The output of the trunk's last block; it is one too.
            selection: The argument `output_hidden_states`: a flag, an index or several.

        Raises:
            UnsupportedModel: It is unknown to which layers the entries belong.
        """
        if output.get("hidden_states") is not None:
            states = self._placed_states(output["hidden_states"])
            first, end = self.trunk_blocks.start, self.trunk_blocks.stop
            states[first + 1 : end] = [None] * (end - first - 1)
            states[first], states[end] = smashed_BTD, trunk_out_BTD
            output["hidden_states"] = self._selected(states, selection)
        if output.get("attentions") is not None:
            output["attentions"] = self._placed_attentions(output["attentions"])

    @property
    def _held(self) -> list[int]:
        return [i for i in range(len(self.blocks)) if i not in self.trunk_blocks]

    def _placed_states(self, found: tuple[Any, ...]) -> list[Any]:
        """The hidden states by index; those at the trunk may be wrong."""
        count = len(self.blocks)
        if len(found) == count + 1:  # the family appended one for each block, also for the trunk's
            return list(found)
        # The input of the first block, and the output of each that the client holds.
        places = [0, *(i + 1 for i in self._held)]
        if len(found) != len(places):
            raise UnsupportedModel(
                f"output_hidden_states=True: {len(found)} hidden states came from the client's "
                f"{len(self._held)} blocks, so their layers are unknown; leave it out"
            )
        states: list[Any] = [None] * (count + 1)
        for place, state in zip(places, found, strict=True):
            states[place] = state
        return states

    def _selected(self, states: list[Any], selection: Any) -> tuple[Any, ...]:
        # Families that collect hidden states themselves take an index as a flag.
        chosen = selected_hidden_states(selection) if "hidden_states" in self.recorded else None
        if chosen is None:
            return tuple(states)
        count = len(states)
        kept = {i % count for i in chosen if -count <= i < count}
        return tuple(state if i in kept else None for i, state in enumerate(states))

    def _placed_attentions(self, found: tuple[Any, ...]) -> tuple[Any, ...]:
        attending = [i for i, block in enumerate(self.blocks) if self._attends(block)]
        held = [i for i in attending if i not in self.trunk_blocks]
        # An attention implementation that computes no weights records none.
        if len(found) == len(attending) or (held and not found):
            return found
        if len(found) != len(held):
            raise UnsupportedModel(
                f"output_attentions=True: {len(found)} attentions came from the client's "
                f"{len(held)} layers with attention, so their layers are unknown; leave it out"
            )
        by_block = dict(zip(held, found, strict=True))
        return tuple(by_block.get(i) for i in attending)

    def _attends(self, block: nn.Module) -> bool:
        """Whether transformers records attention weights of this block."""
        whole = block.original if isinstance(block, PassThrough) else block
        specs = self.recorded.get("attentions", nn.Module)
        kinds = [
            spec.target_class if isinstance(spec, OutputRecorder) else spec
            for spec in (specs if isinstance(specs, list) else [specs])
        ]
        known = tuple(kind for kind in kinds if isinstance(kind, type))
        return not known or any(isinstance(module, known) for module in whole.modules())
