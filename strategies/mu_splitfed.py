"""MU-SplitFed: the trunk takes several steps for each step of the clients.

Liang, Zhang, Chen, Li, Li and Yang 2025, "Towards Straggler-Resilient Split Federated Learning: An
Unbalanced Update Approach", NeurIPS, arXiv 2510.21155: the server makes tau updates of its part
per round of communication, so that slow clients delay it less. The paper estimates gradients with
zeroth-order differences. Here tau is `train.trunk_steps`, and the trunk uses backpropagation: after
each step it runs the stored activations through the new parameters and runs the clients' gradients
of the trunk's output back once more. So the further steps minimize the clients' loss, linearized at
the trunk's output. The client weights are averaged as in SplitFed V2.
"""

import math
from typing import ClassVar

from fedsplit.errors import ConfigError
from fedsplit.flower.strategy import SplitStrategy
from fedsplit.optimization import unscale
from fedsplit.trunk.combine import Gradients
from fedsplit.trunk.update import Contribution, TrunkStep, TrunkUpdate, accumulate


class UnbalancedUpdate(TrunkUpdate):
    """`train.trunk_steps` steps of the trunk with the activations of one step of the clients."""

    keeps_passes: ClassVar = True

    def after_step(self, step: TrunkStep) -> None:
        """Take the further steps; they end early if a gradient overflows."""
        for _ in range(self.run.train.trunk_steps - 1):
            again = [self._again(step, each) for each in step.contributions]
            # A step with NaN or Inf would destroy the trunk's weights; the steps taken so far stay.
            if not all(math.isfinite(each.sq_norm) for each in again):
                break
            step.take(again)

    def _again(self, step: TrunkStep, contribution: Contribution) -> Contribution:
        total: Gradients = {}
        for stored in contribution.passes:
            accumulate(total, step.run_again(stored))
        # The clients' gradients carry float16's loss scale; the optimizer needs them without it.
        unscale(total.values(), contribution.loss_scale)
        return step.contribution_with(contribution, total)


class MUSplitFed(SplitStrategy):
    """`SplitStrategy` with `UnbalancedUpdate`."""

    update: ClassVar = UnbalancedUpdate

    def check(self) -> None:
        """Raise an error unless the trunk takes more than one step.

        Raises:
            ConfigError: `train.trunk_steps` is below two.
        """
        super().check()
        if self.run.train.trunk_steps < 2:
            raise ConfigError(
                f"MUSplitFed with train.trunk_steps={self.run.train.trunk_steps} is SplitFed V2; "
                "set train.trunk_steps to 2 or more, or use strategy=splitfed_v2"
            )
