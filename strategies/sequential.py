"""Sequential split learning: the clients train one after the other and hand the halves on.

Gupta and Raskar 2018, "Distributed learning of deep neural network over multiple agents", Journal
of Network and Computer Applications 116, arXiv 1810.06060, algorithm 2: the server's part trains
with one client at a time, and the next one begins with the weights that the last one left. Here a
turn is a round's work of a client, and the order is drawn anew for each round, from the run's seed.
Each client keeps the moments of its own optimizer; weights alone are handed on.
"""

from typing import ClassVar

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedsplit.errors import ConfigError
from fedsplit.flower.records import ARRAYS
from fedsplit.flower.strategy import SplitStrategy


class Sequential(SplitStrategy):
    """The base, with one client at work at a time."""

    policies: ClassVar = ("sync",)
    averages_clients: ClassVar = False

    def check(self) -> None:
        """Clients take turns, so nothing may need two of them at a time.

        Raises:
            ConfigError: It does.
        """
        super().check()
        if self.run.train.clients_per_pass > 1:
            raise ConfigError(
                f"train.clients_per_pass={self.run.train.clients_per_pass} has clients share a "
                "pass of one trunk, but Sequential lets one work at a time; use "
                "strategy=splitfed_v2 or clients_per_pass=1"
            )

    def train(self, number: int, arrays: ArrayRecord, config: ConfigRecord) -> ArrayRecord:
        """One client after the other, in the order in which the wrapped strategy drew them."""
        for message in self.configure_train(number, arrays, config, self.grid):
            message.content = RecordDict({**message.content, ARRAYS: arrays})
            arrays = self.coordinator.work(number, [message], arrays, self.drain_of(number))
        return arrays
