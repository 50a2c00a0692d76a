"""Why a run goes back to a checkpoint, and to which one."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from fedsplit.errors import CheckpointError
from fedsplit.flower.strategy.round_metrics import RoundMetrics
from fedsplit.spec import PolicySpec

log = logging.getLogger(__name__)

_MOST_REPEATS = 3
"""The most times that a round is repeated. Later it counts without the clients that are missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setback:
    """Why a round does not count.

    Attributes:
        round: The round.
        reason: Why.
        diverged: Whether training diverges, so that the run continues at a lower learning rate.
    """

    round: int
    reason: str
    diverged: bool

    def __str__(self) -> str:
        return f"round {self.round}: {self.reason}"


class Repeats:
    """Decides whether a round is repeated because a client was missing, or all of them.

    Args:
        policy: The policy of the run.
    """

    def __init__(self, policy: PolicySpec) -> None:
        self._waits = policy.missing == "wait"
        # Of each round by itself: a round is repeated also because a later one has to be.
        self._numbers: Counter[int] = Counter()

    def of(self, number: int) -> int:
        """Return how often a round was repeated so far because a client was missing in it."""
        return self._numbers[number]

    def setback_in(self, number: int, metrics: RoundMetrics, short_steps: int) -> Setback | None:
        """Return the setback of a round that has to be repeated.

        Args:
            number: The round.
            metrics: What its clients did.
            short_steps: The steps of the trunk without a client that was awaited.
        """
        # Weights that no client has seen are no reason to end a run.
        all_gone = not metrics.trained and metrics.gone and metrics.gone >= metrics.asked
        if not (all_gone or (self._waits and (metrics.missing or short_steps))):
            return None
        names = ", ".join(sorted(metrics.missing)) or "a client that was awaited"
        repeats = self.of(number)
        if repeats == _MOST_REPEATS:
            log.warning(
                "round %d counts without %s, after %d repetitions",
                number,
                names,
                repeats,
            )
            return None
        self._numbers[number] += 1
        reason = f"{names} did not finish it"
        return Setback(round=number, reason=reason, diverged=False)


def newest_common(
    checkpoints: Mapping[int, Mapping[str, int]], states: Mapping[str, frozenset[int]]
) -> int:
    """Return the newest round of which the server and all clients have an intact checkpoint.

    Args:
        checkpoints: The ids of the clients' states that go with each checkpoint, by round.
        states: The ids of the states that each client can continue from.

    Raises:
        CheckpointError: There is none; the text names the clients.
    """
    lost: list[str] = []
    for number, needed in sorted(checkpoints.items(), reverse=True):
        lost = [name for name, own in states.items() if needed.get(name, 0) not in (0, *own)]
        if not lost:
            return number
        log.warning(
            "The checkpoint of round %d is not used: the state of %s for it is missing or damaged",
            number,
            ", ".join(sorted(lost)),
        )
    raise CheckpointError(
        f"{', '.join(sorted(lost))} cannot continue from any checkpoint of the server (rounds "
        f"{', '.join(map(str, checkpoints))}), because its state is missing or damaged; start it "
        "on the machine that has its state (node config state-dir), or start a new run without "
        "resume"
    )
