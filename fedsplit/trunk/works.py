"""The works of a trunk's sessions: what each has accumulated since its last step."""

from torch import Tensor

from fedsplit.errors import ProtocolError
from fedsplit.trunk.replica import Replica, Work
from fedsplit.trunk.stash import Graph


class Works:
    """The work of each session since its last step; only the engine's thread may use it."""

    def __init__(self) -> None:
        self._works: dict[str, Work] = {}

    def __len__(self) -> int:
        return len(self._works)

    def begun(self, session: str, replica: Replica) -> Work:
        """Return the session's work; new work on the current version if it has none."""
        if session not in self._works:
            self._works[session] = replica.begin()
        return self._works[session]

    def continued(self, session: str, graph: Graph) -> Work:
        """Return the session's work; after a step since this graph, new work on its version."""
        if session not in self._works:
            self._works[session] = Work(
                replica=graph.replica, version=graph.version, barrier_version=graph.barrier_version
            )
        work = self._works[session]
        # The oldest graph decides how stale the whole contribution is.
        work.barrier_version = min(work.barrier_version, graph.barrier_version)
        return work

    def put(self, session: str, work: Work) -> None:
        """Set the work of a session, which a follower has accumulated."""
        self.end(session)
        self._works[session] = work

    def accumulated(self, session: str) -> Work:
        """Return the session's work for its step.

        Raises:
            ProtocolError: There is none.
        """
        work = self._works.get(session)
        if work is None or not work.num_positions:
            raise ProtocolError(
                "there is nothing to step with: no backward since the last step; send one before"
            )
        return work

    def remove(self, session: str) -> None:
        """Remove the session's work, which then belongs to its step."""
        del self._works[session]

    def end(self, session: str) -> None:
        """Drop the session's work, if there is any."""
        if work := self._works.pop(session, None):
            work.end()

    def outdate(self, replica: Replica, barrier: int) -> None:
        """Outdate the works of a replica that are older than `barrier`."""
        for work in self._works.values():
            if work.replica is replica and work.barrier_version < barrier and not work.outdated:
                work.outdate()

    def gradients(self, session: str) -> dict[str, Tensor]:
        """Return a copy of the whole gradients of a session since its last step, by name."""
        if (work := self._works.get(session)) is None:
            return {}
        whole = work.replica.versions.layout.whole
        return {name: whole(name, own) for name, own in work.gradients.items()}
