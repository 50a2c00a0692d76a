"""The history of a run: the rounds that it went back to, and which state of its clients is valid.

A run goes back when it is resumed, and when training diverges. It trains the rounds after that
again, so what a client saved in them before is of another history and must not be used.
"""

import math
import secrets
from dataclasses import dataclass

from fedsplit.errors import ProtocolError


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The branches of a run, oldest first: one for each time that it went back.

    The branch before the first one has the id 0.

    Attributes:
        branches: The random id of each branch.
        rounds: The round that each branch went back to.
    """

    branches: tuple[int, ...] = ()
    rounds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        numbers = (*self.branches, *self.rounds)
        is_valid = all(isinstance(number, int) and number >= 0 for number in numbers)
        if len(self.branches) != len(self.rounds) or not is_valid:
            raise ProtocolError(
                f"the history of the run has {len(self.branches)} branches and {len(self.rounds)} "
                "rounds, which must be as many and whole numbers from 0 on; run the same code at "
                "both sides"
            )

    @property
    def branch(self) -> int:
        """The id of the present branch."""
        return self.branches[-1] if self.branches else 0

    def back_to(self, round: int) -> "History":
        """Return the history after the run went back to the end of `round`."""
        # Random, so that a server that was killed cannot give two branches one id. 62 bits fit the
        # signed 64-bit fields of Flower.
        branch = secrets.randbits(62) | 1
        return History(branches=(*self.branches, branch), rounds=(*self.rounds, round))

    def last_round_of(self, branch: int) -> float:
        """Return the last round of a branch that still counts: infinity for the present branch.

        It is -1 for an unknown branch, of which nothing counts.
        """
        known = (0, *self.branches)
        if branch not in known:
            return -1
        return min(self.rounds[known.index(branch) :], default=math.inf)
