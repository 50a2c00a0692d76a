"""Local losses: no gradient passes through the trunk; the bottom trains on an auxiliary head.

Han, Bhatti, Lee and Moon 2021, "Accelerating Federated Learning with Split Learning on Locally
Generated Losses", ICML Workshop on Federated Learning for User Privacy and Data Confidentiality:
clients train their part on an auxiliary head and do not wait for the server's gradients.
Belilovsky, Eickenberg and Oyallon 2020, "Decoupled Greedy Learning of CNNs", ICML, arXiv
1901.08164, show that such a loss can replace the loss of the whole model. There the server's part
trains as well, on labels that the clients send. Here labels never leave a client, so the trunk is
frozen, and the client's top trains on the trunk's output. This halves the traffic.
"""

from fedsplit.errors import ConfigError
from fedsplit.flower.strategy import SplitStrategy


class LocalLoss(SplitStrategy):
    """`SplitStrategy` for a run in mode `isolated`."""

    def check(self) -> None:
        """Raise an error unless bottom and top train apart.

        Raises:
            ConfigError: `train.mode` is not `isolated`.
        """
        super().check()
        if self.run.train.mode != "isolated":
            raise ConfigError(
                f"LocalLoss with train.mode={self.run.train.mode} would train on the gradients "
                "that it does without; set train.mode=isolated, or use strategy=splitfed_v2"
            )
