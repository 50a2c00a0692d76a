"""Outstanding forward graphs: kept for one backward each, for a time, within a byte budget."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from fedsplit.errors import ActivationExpired
from fedsplit.trunk.batched_pass import BatchedForward
from fedsplit.trunk.compute import Inputs
from fedsplit.trunk.replica import Replica


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Graph:
    """One forward of the trunk, from its inputs to its output, on a version of a replica.

    `barrier_version` counts the barriers that had closed when that version was chosen. Where
    several clients shared a pass, this is member number `place` of the `batched` one.
    """

    inputs: Inputs
    trunk_out_BTD: Tensor
    replica: Replica
    version: int
    barrier_version: int
    num_bytes: int
    expires_at: float
    batched: BatchedForward | None = None
    place: int = 0


class Stash:
    """The graphs of all sessions, oldest first.

    Args:
        budget_bytes: What all graphs together may hold; of the session that holds most, the oldest
            make way for a new one, each with all others of its batched pass.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.num_bytes = 0
        self._budget = budget_bytes
        self._graphs: dict[tuple[str, int], Graph] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def put(self, session: str, call: int, graph: Graph) -> list[Graph]:
        """Keep a graph; returns those that it replaced or that had to make way."""
        dropped = self.drop(session, call)
        while self._graphs and _bytes_of([*self._graphs.values(), graph]) > self._budget:
            dropped += self._drop_pass(self._first_to_go())
        self._graphs[session, call] = graph
        self.num_bytes = _bytes_of(self._graphs.values())
        return dropped

    def take(self, session: str, call: int) -> Graph:
        """Hand out a graph for its backward.

        Raises:
            ActivationExpired: It is not there (any more).
        """
        found = self.drop(session, call)
        if not found:
            raise ActivationExpired(
                f"the graph of call {call} is gone (too old, or the trunk was short of memory); "
                "repeat the forward"
            )
        return found[0]

    def drop(self, session: str, call: int) -> list[Graph]:
        """Forget one graph, if it is there."""
        graph = self._graphs.pop((session, call), None)
        if graph is None:
            return []
        self.num_bytes = _bytes_of(self._graphs.values())
        return [graph]

    def drop_session(self, session: str) -> list[Graph]:
        """Forget all graphs of a session."""
        calls = [key for key in self._graphs if key[0] == session]
        return [graph for key in calls for graph in self.drop(*key)]

    def drop_expired(self, now: float) -> list[Graph]:
        """Forget the graphs whose time is over."""
        old = [key for key, graph in self._graphs.items() if graph.expires_at <= now]
        return [graph for key in old for graph in self.drop(*key)]

    def drop_older(self, replica: Replica, barrier: int) -> list[Graph]:
        """Forget the graphs on one replica that are older than `barrier`."""
        old = [
            key
            for key, graph in self._graphs.items()
            if graph.replica is replica and graph.barrier_version < barrier
        ]
        return [graph for key in old for graph in self.drop(*key)]

    def _drop_pass(self, key: tuple[str, int]) -> list[Graph]:
        """Forget a graph and those that share its pass, as all of them are what is freed."""
        batched = self._graphs[key].batched
        members = [
            each for each, graph in self._graphs.items() if batched and graph.batched is batched
        ]
        return [graph for each in members or [key] for graph in self.drop(*each)]

    def _first_to_go(self) -> tuple[str, int]:
        """The oldest graph of the session that holds most, so that one cannot evict the others."""
        held: Counter[str] = Counter()
        for (session, _), graph in self._graphs.items():
            held[session] += graph.num_bytes
        most = max(held.values())
        return next(key for key in self._graphs if held[key[0]] == most)


def _bytes_of(graphs: Collection[Graph]) -> int:
    """What graphs hold; a batched pass is held as a whole while any member's graph is."""
    joints = {id(graph.batched): graph.batched.num_bytes for graph in graphs if graph.batched}
    return sum(joints.values()) + sum(graph.num_bytes for graph in graphs if not graph.batched)
