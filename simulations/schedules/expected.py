"""What the checker's model expects of sessions, steps and checkpoints, and its arithmetic."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedsplit.wire.delta import as_restored
from simulations.schedules.events import Event
from simulations.schedules.trunk import Array, Values


@dataclass(slots=True, eq=False)
class Contribution:
    """The gradient of one step request: of its session's backwards since the last one."""

    event: Event
    client: str
    step: int
    tokens: int
    version: int
    gradients: Values
    digest: str
    reply: int = -1
    applied: "Event | None" = None
    accepted: "Event | None" = None
    refused: "Event | None" = None


@dataclass(slots=True, eq=False)
class SessionModel:
    """What the trunk should know of a session."""

    client: str
    forwards: dict[int, tuple[Array, int]] = field(default_factory=dict)
    gradients: Values = field(default_factory=dict)
    backwards: dict[int, Event] = field(default_factory=dict)
    version: int = -1
    history: Array | None = None


@dataclass(slots=True, eq=False)
class Checkpoint:
    """A state that was saved, and how many steps of each client it has."""

    event: Event
    values: Values
    taken: dict[str, int]


def input_of(request: Any, codec: str) -> Array:
    """Return the hidden states that the trunk decodes for a forward of a client."""
    x_BTD = request.smashed_BTD
    if request.base_BTD is not None:
        x_BTD = as_restored(x_BTD, codec, request.base_BTD)
    array: Array = x_BTD.numpy()
    return array


def mean_of(gradients: list[Values], weights: list[float]) -> Values:
    """Return the weighted mean of gradients, summed in their order."""
    total: Values = {}
    for each, weight in zip(gradients, weights, strict=True):
        for name, gradient in each.items():
            part = gradient * np.float32(weight)
            total[name] = total[name] + part if name in total else part
    return total
