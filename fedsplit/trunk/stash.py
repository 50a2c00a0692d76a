"""The stash: outstanding forward graphs, kept for one backward each, within a byte budget."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from fedsplit.errors import ActivationExpired
from fedsplit.telemetry.events import CacheState
from fedsplit.trunk.batched_pass import BatchedForward
from fedsplit.trunk.compute import Inputs
from fedsplit.trunk.replica import Replica


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Graph:
    """One forward of the trunk, from its inputs to its output, on a version of a replica.

    `barrier_version` is the number of barriers that had closed when that version was chosen. If
    several clients shared a pass, this is member number `place` of the pass `batched`.
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

    `hits`, `misses` and `evictions` count the graphs that a backward found, those that it did not
    find, and those that were dropped to make room.

    Args:
        budget_bytes: The most that all graphs may hold together. To make room for a new graph, the
            oldest graphs of the session that would hold most are dropped. Those of a batched pass
            are dropped together, and after the others of the session.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.num_bytes = self.hits = self.misses = self.evictions = 0
        self._budget = budget_bytes
        self._graphs: dict[tuple[str, int], Graph] = {}

    @property
    def state(self) -> CacheState:
        """What it holds and has counted; any thread may ask."""
        return CacheState(
            num_bytes=self.num_bytes,
            limit_bytes=self._budget,
            hits=self.hits,
            misses=self.misses,
            evictions=self.evictions,
        )

    def __len__(self) -> int:
        return len(self._graphs)

    def put(self, session: str, call: int, graph: Graph) -> list[Graph]:
        """Keep a graph; return the graphs that it replaced or that were dropped for it."""
        # A repeated forward has the same name, and its graph replaces that of the first.
        dropped = self.drop(session, call)
        # The new graph is kept even if it alone is over the budget, or no step could be made.
        replaced = len(dropped)
        while self._graphs and _bytes_of([*self._graphs.values(), graph]) > self._budget:
            dropped += self._drop_pass(self._first_to_go(session, graph.num_bytes))
        self.evictions += len(dropped) - replaced
        self._graphs[session, call] = graph
        self.num_bytes = _bytes_of(self._graphs.values())
        return dropped

    def take(self, session: str, call: int) -> Graph:
        """Remove and return a graph, for its backward.

        Raises:
            ActivationExpired: There is no such graph, or it was dropped.
        """
        graphs = self.drop(session, call)
        if not graphs:
            self.misses += 1
            raise ActivationExpired(
                f"the graph of call {call} is gone (older than wire.stash_ttl_s, or all graphs "
                "took more than wire.stash_bytes at the trunk); repeat the forward"
            )
        self.hits += 1
        return graphs[0]

    def drop(self, session: str, call: int) -> list[Graph]:
        """Drop one graph, if it is here; return it as a list."""
        graph = self._graphs.pop((session, call), None)
        if graph is None:
            return []
        self.num_bytes = _bytes_of(self._graphs.values())
        return [graph]

    def drop_session(self, session: str) -> list[Graph]:
        """Drop and return all graphs of a session."""
        calls = [key for key in self._graphs if key[0] == session]
        return [graph for key in calls for graph in self.drop(*key)]

    def drop_expired(self, now: float) -> list[Graph]:
        """Drop and return the graphs that have expired at `now`, in seconds."""
        old = [key for key, graph in self._graphs.items() if graph.expires_at <= now]
        return [graph for key in old for graph in self.drop(*key)]

    def drop_older(self, replica: Replica, barrier: int) -> list[Graph]:
        """Drop and return the graphs of one replica that are older than `barrier`."""
        old = [
            key
            for key, graph in self._graphs.items()
            if graph.replica is replica and graph.barrier_version < barrier
        ]
        return [graph for key in old for graph in self.drop(*key)]

    def _drop_pass(self, key: tuple[str, int]) -> list[Graph]:
        """Drop a graph and the others of its pass."""
        # The members of a pass share one graph, so only dropping all of them frees memory.
        batched = self._graphs[key].batched
        members = [
            each for each, graph in self._graphs.items() if batched and graph.batched is batched
        ]
        return [graph for each in members or [key] for graph in self.drop(*each)]

    def _first_to_go(self, session: str, num_bytes: int) -> tuple[str, int]:
        """Return the key of the graph to drop for a new one of `session`."""
        # Not simply the oldest graph: then one client with many graphs could evict all others.
        passes = Counter(id(graph.batched) for graph in self._graphs.values() if graph.batched)
        held: Counter[str] = Counter({session: num_bytes})
        for (owner, _), graph in self._graphs.items():
            # What remains of a pass is held by those whose graphs remain.
            whole = graph.batched.num_bytes // passes[id(graph.batched)] if graph.batched else 0
            held[owner] += whole or graph.num_bytes
        greediest = max((owner for owner, _ in self._graphs), key=lambda owner: held[owner])
        own = [key for key in self._graphs if key[0] == greediest]
        return min(own, key=lambda key: passes[id(self._graphs[key].batched)] > 1)


def _bytes_of(graphs: Collection[Graph]) -> int:
    """Return the bytes of graphs; a batched pass counts as a whole while any member is kept."""
    passes = {id(graph.batched): graph.batched.num_bytes for graph in graphs if graph.batched}
    return sum(passes.values()) + sum(graph.num_bytes for graph in graphs if not graph.batched)
