"""A trunk for users who only evaluate and generate: it opens its sessions by itself.

Shapes: B sequences, T tokens, D hidden width.
"""

import threading

from torch import Tensor

from fedsplit.client.kv_session import TrunkCache
from fedsplit.client.remote import RemoteTrunk
from fedsplit.errors import SessionLost


class EvaluationTrunk:
    """The `carry` of a model that does not train.

    A session that evaluates is opened at the first forward without a KV cache, and again if the
    trunk has lost it. Several threads may use the model; their forwards run one after another.

    Args:
        trunk: The client's trunk, without an open session.
    """

    def __init__(self, trunk: RemoteTrunk) -> None:
        self._trunk = trunk
        self._is_open = False
        self._lock = threading.Lock()

    def __call__(
        self,
        hidden_BTD: Tensor,
        attention_mask_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
        cache: TrunkCache | None = None,
    ) -> Tensor:
        """The trunk's output for these hidden states.

        A backward through it fails, unless only the top trains.

        Raises:
            FedsplitError: The trunk refused, or could not be reached within the budget.
        """
        if cache is not None:
            return self._trunk(hidden_BTD, attention_mask_BT, position_ids_BT, cache)
        with self._lock:
            if self._is_open:
                try:
                    return self._trunk(hidden_BTD, attention_mask_BT, position_ids_BT)
                except SessionLost:  # an idle session ends, and so do those of a stopped server
                    self._is_open = False
            self._trunk.open(training=False)
            self._is_open = True
            return self._trunk(hidden_BTD, attention_mask_BT, position_ids_BT)

    def new_cache(self, max_length: int | None = None) -> TrunkCache:
        """A KV cache at the trunk, growing or with a capacity of `max_length` tokens."""
        return self._trunk.new_cache(max_length)
