"""MU-SplitFed: the trunk takes several steps for each step of the clients.

Liang, Zhang, Chen, Li, Li and Yang 2025, "Towards Straggler-Resilient Split Federated Learning: An
Unbalanced Update Approach", NeurIPS, arXiv 2510.21155: the server makes tau updates of its part
per round of communication, so that slow clients hold it up less. There gradients are estimated
with zeroth-order differences; here, in the spirit of its unbalanced update, the trunk steps with
backpropagation, `train.trunk_steps` times from the activations and gradients of the clients' one
step (`fedsplit.trunk`). The halves are averaged as in SplitFed V2.
"""

from fedsplit.errors import ConfigError
from fedsplit.flower.strategy import SplitStrategy


class MUSplitFed(SplitStrategy):
    """The base, for a run whose trunk steps more often than its clients."""

    def check(self) -> None:
        """The trunk has to take more than one step.

        Raises:
            ConfigError: It takes one.
        """
        super().check()
        if self.run.train.trunk_steps < 2:
            raise ConfigError(
                f"MUSplitFed with train.trunk_steps={self.run.train.trunk_steps} is SplitFed V2; "
                "set train.trunk_steps to 2 or more, or use strategy=splitfed_v2"
            )
