"""A client's model for one message: built, or copied from a prototype that the process keeps.

Building takes several times as long as copying, and a simulation has many messages in one
process. A copy is a new model, so nothing that one message does to its model reaches the next.
"""

import copy
import threading
from collections.abc import Callable
from typing import Any, cast

from transformers import PreTrainedModel

from fedsplit.model.quantization import twin_of


class Prototype:
    """Keeps a model of the last run, for copies. Any thread may call `model_of`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: Any = None
        self._model: PreTrainedModel | None = None

    def model_of(self, key: Any, build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """A model of its own for the caller, with the values that `build` gives it.

        Args:
            key: Equal for calls whose models are equal.
            build: Builds the model.
        """
        # Other threads wait for the prototype instead of building the same model meanwhile.
        with self._lock:
            if key != self._key:
                # A deployed client has one message in each process, and needs no second model.
                self._key, self._model = key, None
                return build()
            if self._model is None:
                self._model = build()
            return _copy_of(self._model)

    def clear(self) -> None:
        """Release the memory of the model."""
        with self._lock:
            self._key = self._model = None


def _copy_of(model: PreTrainedModel) -> PreTrainedModel:
    # Frozen parameters share their memory, since nothing writes into them. They are objects of
    # their own, since a move to another device replaces what such an object holds.
    memo: dict[int, Any] = {}
    for frozen in (p for p in model.parameters() if not p.requires_grad):
        twin: Any = twin_of(frozen)
        memo[id(frozen)] = twin
        # The layer of a quantized weight refers to its statistics too.
        if hasattr(twin, "quant_state"):
            memo[id(cast(Any, frozen).quant_state)] = twin.quant_state
    return copy.deepcopy(model, memo)
