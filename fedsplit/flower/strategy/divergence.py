"""The guard of a run: decides after each round whether training diverges.

More than half of the run's clients must show it, each by its own numbers, so that fewer of them
cannot decide, also where a round has only some of the clients.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from fedsplit.flower.records import WEIGHT
from fedsplit.flower.strategy.round_metrics import RoundMetrics
from fedsplit.flower.strategy.state import under
from fedsplit.spec import RunSpec

_BAD_STEPS, _LOWEST, _WORSE = "bad_steps/", "lowest/", "worse/"
_LEAST_LOSS = 0.1
"""The least loss that others are compared with, in nats; a lower one may rise by many times."""


class DivergenceGuard:
    """Compares the rounds of each client.

    Args:
        run: The run; its guard has the bounds.

    Attributes:
        is_calm: Whether the last round showed nothing that may become a problem.
    """

    def __init__(self, run: RunSpec) -> None:
        self.is_calm = True
        self._spec = run.guard
        self._clients = run.num_nodes
        self._bad_steps: Counter[str] = Counter()
        self._lowest: dict[str, float] = {}
        self._worse: set[str] = set()

    def problem_in(self, metrics: RoundMetrics) -> str:
        """Return why a round shows that training diverges; empty if it does not."""
        self.is_calm = True
        return self._without_steps(metrics) or self._too_large(metrics)

    def state(self) -> dict[str, Tensor]:
        """Return the state at the end of a round, by name."""
        state = {_BAD_STEPS + name: float(number) for name, number in self._bad_steps.items()}
        state |= {_LOWEST + name: loss for name, loss in self._lowest.items()}
        state |= {_WORSE + name: 1.0 for name in self._worse}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state that `state` returned."""
        values = {name: value.item() for name, value in state.items()}
        self._bad_steps = Counter({n: int(v) for n, v in under(_BAD_STEPS, values).items()})
        self._lowest = under(_LOWEST, values)
        self._worse = set(under(_WORSE, values))

    def _without_steps(self, metrics: RoundMetrics) -> str:
        took_steps = {name for name, numbers in metrics.trained if numbers["steps"]}
        for name, numbers in metrics.trained:
            if numbers["steps"]:
                self._lowest.setdefault(name, numbers["loss"])
            self._bad_steps[name] += int(numbers["skipped"])
        for name in metrics.broken:
            self._bad_steps[name] += self._spec.bad_steps
        for name in took_steps:
            self._bad_steps[name] = 0
        # One client that can train shows that the weights are not the reason.
        if took_steps or not metrics.asked or not self._spec.bad_steps:
            return ""
        self.is_calm &= not self._is_most(+self._bad_steps)
        most = self._spec.bad_steps
        if not self._is_most([name for name, number in self._bad_steps.items() if number >= most]):
            return ""
        return (
            f"most of {self._clients} clients could not take their last {most} steps, because "
            "numbers were not finite or out of proportion (guard.bad_steps)"
        )

    def _too_large(self, metrics: RoundMetrics) -> str:
        most = self._spec.worse_loss
        losses = {name: n["loss"] for name, n in metrics.evaluated if n[WEIGHT]}
        losses |= dict.fromkeys(metrics.unmeasured, math.inf)
        if not losses or not most:
            return ""
        for name, loss in losses.items():
            lowest = self._lowest.get(name, math.inf)
            if math.isfinite(loss) and loss <= most * max(lowest, _LEAST_LOSS):
                self._lowest[name] = min(lowest, loss)
                self._worse.discard(name)
            else:
                self._worse.add(name)
        if not self._is_most(self._worse):
            return ""
        self.is_calm = False
        return (
            f"the held-out loss of {len(self._worse)} of {self._clients} clients is not finite, or "
            f"over {most:g} times its lowest value (guard.worse_loss); the largest is "
            f"{max(losses.values()):.4g}"
        )

    def _is_most(self, clients: Collection[str]) -> bool:
        return 2 * len(clients) > self._clients
