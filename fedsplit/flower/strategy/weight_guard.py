"""The guard of the client weights: compares each client's change with those of the rounds before.

A change grows with the number of steps, and clients that train by epochs take different numbers.
So its norm for each step is compared.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from fedsplit.errors import GradExploded
from fedsplit.flower.npy import values_of
from fedsplit.flower.records import ARRAYS, METRICS
from fedsplit.flower.sealed_arrays import is_sealed
from fedsplit.spec import GuardSpec
from fedsplit.trunk.norm_guard import NormGuard

log = logging.getLogger(__name__)

_FIRST = 3
"""The changes after which the guard begins: a median is of three at least."""


class WeightGuard:
    """Clips a change of the client weights that is out of proportion, or refuses it.

    The bounds stay as they are within a round, so that no result depends on the order of arrival.

    Args:
        spec: The settings of the guard.
        clients: The number of clients of the run.
        memory: The number of changes in which a former usual norm is halved. Clients may be at
            different places of the learning rate schedule, so it should be that of the whole run.
    """

    def __init__(self, spec: GuardSpec, *, clients: int, memory: int) -> None:
        # A round has one change of a client, so the guard would begin after many rounds.
        spec = replace(spec, after=min(spec.after, _FIRST))
        self._guard = NormGuard(spec, clients=clients, memory=memory)
        self._of_round: dict[str, float] = {}

    def bounded(self, client: str, content: RecordDict, sent: ArrayRecord) -> RecordDict:
        """Return the checked content of a reply to training, its change clipped.

        Args:
            client: The client.
            content: The content, as `training_content` returned it.
            sent: The client weights that were sent, as the client decoded them.

        Raises:
            GradExploded: The change is far larger than those of the rounds before.
        """
        steps = content.metric_records[METRICS]["steps"]
        # What is sealed cannot be compared with anything.
        if not sent or not steps or is_sealed(sent):
            return content
        changes = {
            name: values_of(array) - values_of(sent[name])
            for name, array in content.array_records[ARRAYS].items()
        }
        norm = _norm(changes.values()) / steps  # type: ignore[operator]
        bounds = self._guard.bounds_of(client)
        if norm > bounds.refuse:
            raise GradExploded(
                f"its change of the client weights has norm {norm:.3g} a step, and at most "
                f"{bounds.refuse:.3g} is accepted after those of the rounds before "
                "(guard.refuse_above)"
            )
        self._of_round[client] = min(norm, bounds.clip)
        if norm <= bounds.clip:
            return content
        log.warning(
            "%s: its change of the client weights is clipped, from norm %.3g a step to "
            "%.3g (guard.clip_above)",
            client,
            norm,
            bounds.clip,
        )
        factor = bounds.clip / norm
        clipped = {
            name: Array((values_of(sent[name]) + factor * change).astype(change.dtype))
            for name, change in changes.items()
        }
        return RecordDict({**content, ARRAYS: ArrayRecord(clipped)})

    def end_round(self) -> None:
        """Let the next round be compared with the changes of this one as well."""
        for client, norm in sorted(self._of_round.items()):
            self._guard.add(client, norm)
        self._of_round.clear()

    def state(self) -> dict[str, Tensor]:
        """Return the state at the end of a round, by name."""
        return {
            name: torch.tensor(value, dtype=torch.float64)
            for name, value in self._guard.state().items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state that `state` returned."""
        self._guard.load_state({name: tensor.item() for name, tensor in state.items()})
        self._of_round.clear()


def _norm(arrays: Iterable[np.ndarray]) -> float:
    return math.sqrt(sum(float(np.square(each, dtype=np.float64).sum()) for each in arrays))
