"""A request at the trunk's engine: its kind, its client, its reply to be, and what it runs on.

Shapes: B sequences, T tokens, D hidden width.
"""

from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from fedsplit.trunk.compute import Inputs
from fedsplit.trunk.replica import Work
from fedsplit.trunk.stash import Graph


class Kind(Enum):
    """What a call asks for; the value is its priority, lower first.

    Backwards and steps free memory, so they go before forwards. A session joins and ends after
    the forwards that it has in the queue, so that no forward leaves a graph behind a closed
    session, and the end of an old session cannot undo the start of a new one.
    """

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
        """0 for calls that run first."""
        return self.value[0]


ORDERED = frozenset({Kind.FORWARD, Kind.STEP, Kind.LEAVE})
"""Kinds that other clients can notice: a barrier or a virtual clock decides when they run."""


@dataclass(slots=True, kw_only=True, eq=False)
class Call:
    """One request on its way through the engine.

    `request` is the message of a client, or what a control call runs. A call waits until the
    scheduler takes it. A forward then gets its `inputs` and `work`, and a backward its `graph`;
    from there on the call is `prepared` and may wait for others to share a pass with. It is
    finished when `future` has a result.
    """

    kind: Kind
    client: str = ""
    session: str = ""
    round: int = 0
    request: Any = None
    future: "Future[Any]" = field(default_factory=Future)
    prepared: bool = False
    inputs: Inputs = field(init=False)
    work: Work = field(init=False)
    graph: Graph = field(init=False)

    @property
    def batch_key(self) -> Hashable:
        """Equal for prepared calls that can run as one pass."""
        if self.kind is Kind.BACKWARD:
            return id(self.graph.batched or self.graph)
        shape_TD = self.inputs.smashed_BTD.shape[1:]
        given = self.inputs.attention_mask_BT is not None, self.inputs.position_ids_BT is not None
        return id(self.work.replica), self.work.version, shape_TD, given

    @property
    def batch_order(self) -> Any:
        """Where the call stands among those of its pass."""
        if self.kind is Kind.BACKWARD:
            return self.graph.place
        return self.client, self.request.call

    def run(self) -> Any:
        """Run a control call."""
        work: Callable[[], Any] = self.request
        return work()
