"""Dry runs of a model on fake tensors: which modules run before, between and after its blocks.

Fake tensors have no memory: a model of 80 blocks takes half a second. Probes replace the blocks.
They record how the family passes hidden states from block to block, and they find side channels
that a cut would sever.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedsplit.model.pass_through import PassThrough

# Operators that read the shape of a tensor, but not its values.
_SHAPE_ONLY = frozenset(
    "zeros_like ones_like full_like empty_like rand_like randn_like "
    "new_zeros new_ones new_full new_empty".split()
)

# Errors that a family's own code may raise for a part, a probe or an unusual config.
FAMILY_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors inside nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


class Taint(TorchDispatchMode):
    """Taint tracking: marks every tensor that is computed from a marked one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # By id, since `==` of tensors compares values.
        self._marked: dict[int, Tensor] = {}

    def mark(self, tensors: Iterable[Tensor]) -> None:
        """Mark these tensors."""
        # The references keep the tensors alive, so that Python does not reuse their ids.
        self._marked.update((id(t), t) for t in tensors)

    def reaches(self, value: Any) -> bool:
        """Whether any tensor in `value` is marked."""
        return any(id(t) in self._marked for t in tensors_in(value))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator; mark its results if it read a marked tensor's values."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        reads_values = func._schema.name.split("::")[1] not in _SHAPE_ONLY
        if reads_values and self.reaches((args, kwargs)):
            self.mark(tensors_in(out))
        return out


@dataclass(slots=True)
class Journal:
    """The record of one dry run.

    Attributes:
        num_blocks: The number of blocks.
        phase: The current position: before the first block, between two, or after the last.
        shapes: The shapes of the hidden states that the blocks got, in order.
        faults: Reasons why the model cannot be cut.
        ran: The phases in which a module ran, by the module's name.
    """

    num_blocks: int
    phase: str = "before"
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    ran: dict[str, set[str]] = field(default_factory=dict)

    @property
    def is_chain(self) -> bool:
        """Whether each block ran once and got hidden states [B, T, D] of one shape."""
        once = len(self.shapes) == self.num_blocks and len(set(self.shapes)) == 1
        return once and len(self.shapes[0]) == 3


class Probe(PassThrough):
    """A replacement of a block: records its arguments and returns a new tensor."""

    def __init__(
        self, original: nn.Module, index: int, returns_tuple: bool, journal: Journal, taint: Taint
    ) -> None:
        super().__init__(original)
        self.index, self.returns_tuple = index, returns_tuple
        self.journal, self.taint = journal, taint

    def forward(self, hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        """An unmarked tensor of the shape of `hidden_BTD`."""
        journal = self.journal
        journal.shapes.append(tuple(hidden_BTD.shape))
        journal.phase = "after" if self.index == journal.num_blocks - 1 else "between"
        positional = ((f"argument {i}", value) for i, value in enumerate(args, start=1))
        for name, value in (*positional, *kwargs.items()):
            self._look_at(name, value)
        # A new tensor has no mark, so a mark after the last block comes from a side channel.
        out_BTD = torch.zeros(hidden_BTD.shape, dtype=hidden_BTD.dtype)
        return (out_BTD,) if self.returns_tuple else out_BTD

    def _look_at(self, name: str, value: Any) -> None:
        if self.taint.reaches(value):
            self.journal.faults.append(
                f"layers are handed '{name}', computed from weights, beside the hidden states"
            )
        # One block could fill such a container for another; an attention mask is only read.
        is_shared = isinstance(value, (dict, list)) and name != "attention_mask"
        if is_shared and not any(True for _ in tensors_in(value)):
            self.journal.faults.append(f"layers share mutable state '{name}'")


def observe(
    model: nn.Module,
    blocks: nn.ModuleList,
    beside: dict[str, nn.Module],
    inputs: dict[str, Any],
    returns_tuple: bool,
) -> Journal:
    """Run `model` with probes in place of its blocks.

    Args:
        model: A model on fake tensors; it is restored before the function returns.
        blocks: The list of the model's blocks.
        beside: The modules whose phases are recorded, by name.
        inputs: The arguments of the model's forward.
        returns_tuple: Whether probes return a tuple instead of a tensor.

    Returns:
        The record of the run.

    Raises:
        Exception: Any of `FAMILY_ERRORS`, from the family's own forward.
    """
    taint, journal, originals = Taint(), Journal(num_blocks=len(blocks)), list(blocks)

    def note(name: str) -> Callable[[nn.Module, Any], None]:
        def enter(module: nn.Module, _: Any) -> None:
            journal.ran.setdefault(name, set()).add(journal.phase)
            # Only weights that run before the blocks can reach the head around them.
            if journal.phase == "before":
                taint.mark(module.state_dict(keep_vars=True).values())

        return enter

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in beside.items()]
    for i, original in enumerate(originals):
        blocks[i] = Probe(original, i, returns_tuple, journal, taint)
    try:
        with torch.no_grad(), taint:
            out = dict(model(**inputs))
    finally:
        for i, original in enumerate(originals):
            blocks[i] = original
        for hook in hooks:
            hook.remove()
    if taint.reaches([out.get("logits"), out.get("last_hidden_state")]):
        journal.faults.append("the head reads the embeddings by a path that goes round the layers")
    return journal
