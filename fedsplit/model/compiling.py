"""Compilation of a part's blocks, with a fallback to plain Python if it fails.

Each block is compiled by itself. All blocks have the same code, so one compilation serves them
all. The code around them, such as masks and the call to a remote trunk, stays plain Python.
"""

import functools
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fedsplit.model.plan import plan_for
from fedsplit.model.stage import Part

log = logging.getLogger(__name__)

# Marks a forward that is compiled already.
_COMPILED = "fedsplit_compiled"


def compile_blocks(model: PreTrainedModel, mode: str) -> None:
    """Compile the blocks of a part, or of an unsplit model, for passes with gradients.

    Passes without gradients run the plain code: in generation, every step has another shape.

    Args:
        model: Changed in place; a second call changes nothing.
        mode: The mode of `torch.compile`.
    """
    compiler = _Compiler(type(model).__name__, mode)
    for block in _blocks(model):
        if not hasattr(block.forward, _COMPILED):
            compiler.take(block)


def _blocks(model: PreTrainedModel) -> Iterable[nn.Module]:
    if not isinstance(model, Part):
        blocks: Any = model.get_submodule(plan_for(type(model), model.config).blocks)
        return blocks  # type: ignore[no-any-return]
    held: Any = model.get_submodule(model.plan.blocks)
    return [held[i] for i in model.held_blocks]


class _Compiler:
    """Compiles blocks on their first use; after the first failure all blocks run plain."""

    def __init__(self, name: str, mode: str) -> None:
        # This import takes about a second, and runs without compilation do not need it.
        from torch._dynamo.exc import TorchDynamoException

        self._name = name
        self._mode = mode
        self._failure = TorchDynamoException
        self._works = True

    def take(self, block: nn.Module) -> None:
        """Replace the block's forward."""
        # The forward and not the module: a wrapper module would change the names of parameters.
        plain: Any = block.forward
        fast: Any = torch.compile(plain, mode=self._mode)

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._works and torch.is_grad_enabled():
                # torch.compile compiles at the first call, so its errors appear here.
                try:
                    return fast(*args, **kwargs)
                except self._failure as exc:
                    self._give_up(exc)
            return plain(*args, **kwargs)

        setattr(forward, _COMPILED, True)
        block.forward = forward

    def _give_up(self, exc: Exception) -> None:
        self._works = False
        reason = next(filter(None, map(str.strip, str(exc).splitlines())), type(exc).__name__)
        log.warning("%s runs without torch.compile, which failed: %s", self._name, reason)
