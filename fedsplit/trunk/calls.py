"""What a client asks of the trunk in training, once it may run: whom it is for, and what it needs.

Shapes: B sequences, T tokens, D hidden width.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from fedsplit.trunk.compute import Inputs
from fedsplit.trunk.replica import Work
from fedsplit.trunk.stash import Graph


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """Whom work is done for: a client in one session, in one round.

    `cache_tokens` is 0 for a session that generates with a cache that grows.
    """

    client: str
    session: str
    round: int
    training: bool
    generating: bool = False
    cache_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Begun:
    """A training forward that may run now."""

    worker: Worker
    call: int
    inputs: Inputs
    work: Work

    @property
    def kind(self) -> Hashable:
        """What forwards have in common that can run at once."""
        work, inputs = self.work, self.inputs
        shape_TD = inputs.smashed_BTD.shape[1:]
        given = inputs.attention_mask_BT is not None, inputs.position_ids_BT is not None
        return id(work.replica), work.version, shape_TD, given


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Taken:
    """A backward that may run now, and the graph that it is for."""

    worker: Worker
    graph: Graph
    want_grad: bool
    grad_trunk_out_BTD: Tensor

    @property
    def kind(self) -> Hashable:
        """What backwards have in common that can run at once."""
        return id(self.graph.joint or self.graph)

    @property
    def num_members(self) -> int:
        """How many calls it runs with, itself among them."""
        joint = self.graph.joint
        return len(joint.rows) if joint and not joint.broken else 1
