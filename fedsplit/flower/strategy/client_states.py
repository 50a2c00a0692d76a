"""The states of the clients that go with the server's weights, each by its random id.

A client's state (optimizer moments, position in its data, personal part) changes with every work.
The server names the state that the next work begins with, so that both sides go back together:
after a crash, after a round that is repeated, and after a reply that was lost.
"""

from collections.abc import Iterable, Mapping

from fedsplit.flower.records import new_state_id
from fedsplit.flower.strategy.round_policy import Work


class ClientStates:
    """The last state of each client; 0 is the state before any work.

    Attributes:
        done: The clients that have taken all steps of the run.
    """

    def __init__(self) -> None:
        self.done: set[str] = set()
        self._last: dict[str, int] = {}
        # By the number of the work: the state that it began with, and the one that it makes.
        self._works: dict[int, tuple[int, int]] = {}

    def of(self, client: str) -> int:
        """Return the state from which a client's next work begins."""
        return self._last.get(client, 0)

    def begin(self, work: Work) -> int:
        """Return the id of the state that this work will make."""
        self._works[work.number] = (self.of(work.client), new_state_id())
        return self._works[work.number][1]

    def replied(self, work: Work) -> None:
        """Take the state that a work has made for the client's last one."""
        self._last[work.client] = self._works[work.number][1]

    def ended(self, work: Work) -> None:
        """Forget a work: its reply is merged, or will never be."""
        self._works.pop(work.number, None)

    def merged(self, unmerged: Iterable[Work]) -> dict[str, int]:
        """Return the state of each client without the work that has replied and is not merged.

        Args:
            unmerged: That work, in the order of its numbers.
        """
        states = dict(self._last)
        for work in reversed(list(unmerged)):
            states[work.client] = self._works[work.number][0]
        return states

    def needed(self, client: str, unmerged: Iterable[Work]) -> set[int]:
        """Return the states of a client that the next checkpoint may name."""
        starts = {self._works[work.number][0] for work in unmerged if work.client == client}
        return {self.of(client), *starts}

    def go_back(self, states: Mapping[str, int]) -> None:
        """Continue from the states that a checkpoint goes with."""
        self._last = dict(states)
        self._works.clear()
