"""Sequential split learning: one client trains at a time, and the next one gets its weights.

Gupta and Raskar 2018, "Distributed learning of deep neural network over multiple agents", Journal
of Network and Computer Applications 116, arXiv 1810.06060, algorithm 2: the server's part trains
with one client at a time, and the next client starts from the weights of the one before. Here a
client trains for all its steps of a round, and the order of the clients is drawn for each round
from the run's seed. Each client keeps the moments of its own optimizer; only weights are passed on.
"""

from typing import ClassVar

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedsplit.errors import ConfigError
from fedsplit.flower.records import ARRAYS
from fedsplit.flower.strategy import SplitStrategy


class Sequential(SplitStrategy):
    """`SplitStrategy` with one client training at a time."""

    policies: ClassVar = ("sync",)
    averages_clients: ClassVar = False

    def check(self) -> None:
        """Raise an error for a setting that needs several clients at a time.

        Raises:
            ConfigError: `train.clients_per_pass` is above one, or `policy.combine` is no mean.
        """
        super().check()
        if self.run.policy.combine != "mean":
            raise ConfigError(
                f"policy.combine={self.run.policy.combine} combines the gradients of several "
                "clients, but Sequential lets one train at a time; use policy.combine=mean"
            )
        if self.run.train.clients_per_pass > 1:
            raise ConfigError(
                f"train.clients_per_pass={self.run.train.clients_per_pass} has clients share a "
                "pass of one trunk, but Sequential lets one work at a time; use "
                "strategy=splitfed_v2 or clients_per_pass=1"
            )

    def train(self, number: int, arrays: ArrayRecord, config: ConfigRecord) -> ArrayRecord:
        """Train one client after the other, in the order that the wrapped strategy drew."""
        for message in self.configure_train(number, arrays, config, self.grid):
            # The message was made with the weights before the round; send the previous client's.
            message.content = RecordDict({**message.content, ARRAYS: arrays})
            arrays = self.coordinator.work(number, [message], arrays, self.drain_of(number))
        return arrays
