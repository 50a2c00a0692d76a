"""Local losses: nothing flows back through the trunk; the bottom learns from a head of its own.

Han, Bhatti, Lee and Moon 2021, "Accelerating Federated Learning with Split Learning on Locally
Generated Losses", ICML Workshop on Federated Learning for User Privacy and Data Confidentiality:
clients train their part on an auxiliary head and do not wait for the server's gradients. That
such a loss can stand in for the one at the far end is from Belilovsky, Eickenberg and Oyallon
2020, "Decoupled Greedy Learning of CNNs", ICML, arXiv 1901.08164. There the server's part trains as
well, on labels that the clients send; here labels never leave, so the trunk stays as it is and
the client's top trains on what it sends back. Half of the traffic falls away.
"""

from fedsplit.errors import ConfigError
from fedsplit.flower.strategy import SplitStrategy


class LocalLoss(SplitStrategy):
    """The base, for a run in mode `isolated`."""

    def check(self) -> None:
        """The parts have to train apart.

        Raises:
            ConfigError: They train together.
        """
        super().check()
        if self.run.train.mode != "isolated":
            raise ConfigError(
                f"LocalLoss with train.mode={self.run.train.mode} would train on the gradients "
                "that it does without; set train.mode=isolated, or use strategy=splitfed_v2"
            )
