"""A call: one request on its way through the trunk's engine, with its kind and its future.

Shapes: B sequences, T tokens, D hidden width.
"""

from collections.abc import Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from fedsplit.telemetry.context import current_fields
from fedsplit.telemetry.spans import Span, current
from fedsplit.trunk.compute import Inputs
from fedsplit.trunk.replica import Work
from fedsplit.trunk.stash import Graph


class Kind(Enum):
    """The kind of a call; the value is its priority, lower first, and its name.

    Backwards and steps free memory, so they run before forwards. A session joins and ends after
    its forwards in the queue, so that no forward leaves a graph of a closed session, and the end
    of an old session cannot undo the start of a new one.
    """

    # The name makes values differ: an Enum makes members of one value aliases of each other.
    BACKWARD = (0, "backward")
    STEP = (0, "step")
    CONTROL = (0, "control")
    TICK = (0, "tick")
    GENERATE = (1, "generate")
    FORWARD = (2, "forward")
    EVALUATE = (2, "evaluate")
    CLOSE = (2, "close")
    LEAVE = (2, "leave")
    LATE_CONTROL = (2, "late control")

    @property
    def priority(self) -> int:
        """The priority; 0 for calls that run first."""
        return self.value[0]


ORDERED = frozenset({Kind.FORWARD, Kind.STEP, Kind.LEAVE})
"""Kinds with an effect on other clients: a barrier or a virtual clock decides when they run."""


@dataclass(slots=True, kw_only=True, eq=False)
class Call:
    """One request on its way through the engine.

    `request` is the message of a client, or the function or order of a control call. A call waits
    until the scheduler returns it. A forward then gets its `inputs` and `work`, and a backward its
    `graph`. After that the call is `prepared`, and may wait for other calls of its pass. It is
    finished when `future` has a result. `submitted_at` is the time when it was queued, in seconds,
    and `span` and `fields` are those of its request.
    """

    kind: Kind
    client: str = ""
    session: str = ""
    round: int = 0
    request: Any = None
    future: "Future[Any]" = field(default_factory=Future)
    submitted_at: float = 0.0
    span: Span = field(default_factory=current)
    fields: Mapping[str, object] = field(default_factory=current_fields)
    prepared: bool = False
    inputs: Inputs = field(init=False)
    work: Work = field(init=False)
    graph: Graph = field(init=False)

    @property
    def batch_key(self) -> Hashable:
        """The key of a prepared call; calls of the same key can run as one pass."""
        if self.kind is Kind.BACKWARD:
            return id(self.graph.batched or self.graph)
        inputs = self.inputs
        shape_TD = inputs.smashed_BTD.shape[1:]
        # The version is in the key, because a pass runs on one set of parameters.
        present = inputs.attention_mask_BT is not None, inputs.position_ids_BT is not None
        replica, version = id(self.work.replica), self.work.version
        kind = inputs.train_mode, inputs.autocast, inputs.tables
        return replica, version, kind, shape_TD, present

    @property
    def batch_order(self) -> Any:
        """The position of the call among those of its pass, as a key for sorting."""
        if self.kind is Kind.BACKWARD:
            # A batched backward needs the gradients in the row order of its forward.
            return self.graph.place
        return self.client, self.request.call

    @property
    def positions(self) -> int:
        """The sequences times tokens of a forward or a backward; 0 of others."""
        match self.kind:
            case Kind.FORWARD | Kind.EVALUATE:
                return self.request.smashed_BTD.shape[:2].numel()  # type: ignore[no-any-return]
            case Kind.BACKWARD:
                return self.request.grad_trunk_out_BTD.shape[:2].numel()  # type: ignore[no-any-return]
        return 0
