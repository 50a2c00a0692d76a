"""A part's blocks, compiled one by one; as they were where that cannot be done.

Blocks and not the whole part: they are alike, so that one compilation serves them all, and what
lies between them (masks, a trunk that is far away) stays plain Python.
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

_COMPILED = "fedsplit_compiled"


def compile_blocks(model: PreTrainedModel, mode: str) -> None:
    """Have the blocks of a part, or of an unsplit model, run compiled wherever they train.

    Without gradients they run as they are: in generation every step has another shape.

    Args:
        model: Compiled once; a second time changes nothing.
        mode: Of `torch.compile`.
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
    """Compiles blocks until the first failure, after which none of them is compiled."""

    def __init__(self, name: str, mode: str) -> None:
        from torch._dynamo.exc import TorchDynamoException  # takes a second, and only here

        self._name = name
        self._mode = mode
        self._failure = TorchDynamoException
        self._works = True

    def take(self, block: nn.Module) -> None:
        """Replace a block's forward."""
        plain: Any = block.forward
        fast: Any = torch.compile(plain, mode=self._mode)

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._works and torch.is_grad_enabled():
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
