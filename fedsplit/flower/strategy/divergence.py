"""The guard of a run: decides after each round whether training diverges.

It takes the median of what the clients report, so that less than half of them cannot decide.
"""

import math
from collections.abc import Mapping
from statistics import median_low

import torch
from torch import Tensor

from fedsplit.flower.records import WEIGHT
from fedsplit.flower.strategy.round_metrics import RoundMetrics
from fedsplit.spec import GuardSpec


class DivergenceGuard:
    """Compares the rounds of a run.

    Args:
        spec: The settings of the guard.

    Attributes:
        lowest: The lowest held-out loss of the median client so far, in nats per token.
        bad_steps: The steps in a row, up to now, that no client could take.
    """

    def __init__(self, spec: GuardSpec) -> None:
        self.lowest = math.inf
        self.bad_steps = 0
        self._spec = spec

    def state(self) -> dict[str, Tensor]:
        """Return the state at the end of a round, by name."""
        state = {"lowest": self.lowest, "bad_steps": self.bad_steps}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state that `state` returned."""
        self.lowest, self.bad_steps = state["lowest"].item(), int(state["bad_steps"])

    def problem_in(self, metrics: RoundMetrics) -> str:
        """Return why a round shows that training diverges; empty if it does not."""
        return self._without_steps(metrics) or self._too_large(metrics)

    def _without_steps(self, metrics: RoundMetrics) -> str:
        if not metrics.asked:
            return ""
        if sum(numbers["steps"] for _, numbers in metrics.trained):
            self.bad_steps = 0
            return ""
        most = self._spec.bad_steps
        # A client that was given up for another reason says nothing about the numbers.
        skipped = dict.fromkeys(metrics.asked, 0.0) | dict.fromkeys(metrics.broken, float(most))
        skipped |= {name: numbers["skipped"] for name, numbers in metrics.trained}
        self.bad_steps += int(median_low(skipped.values()))
        if not 0 < most <= self.bad_steps:
            return ""
        return (
            f"the last {self.bad_steps} steps failed at all clients, because numbers were not "
            "finite or out of proportion (guard.bad_steps)"
        )

    def _too_large(self, metrics: RoundMetrics) -> str:
        most = self._spec.worse_loss
        losses = [n["loss"] for _, n in metrics.evaluated if n[WEIGHT]]
        losses += [math.inf] * len(metrics.unmeasured)
        if not losses or not most:
            return ""
        loss = median_low(losses)
        if math.isfinite(loss) and loss <= most * self.lowest:
            self.lowest = min(self.lowest, loss)
            return ""
        return (
            f"the held-out loss is {loss:.4g} at the median client, over {most:g} times the lowest "
            f"one, {self.lowest:.4g} (guard.worse_loss)"
        )
