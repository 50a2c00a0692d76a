"""SplitFed V1: every client has a trunk of its own, and all parts are averaged after each round.

Thapa, Mahawaga Arachchige, Camtepe and Sun 2022, "SplitFed: When Federated Learning Meets Split
Learning", AAAI 36(8), arXiv 2004.12088, section 3 and algorithm 1 (SFLV1): the server trains a
copy of its part for each client, all in parallel, and averages the copies, weighted by the
clients' data, when the client sides are averaged. The weights here are tokens. Within a round no
copy waits for another one, so a slow client delays only the end of the round.
"""

from collections.abc import Sequence
from typing import ClassVar

from fedsplit.errors import ConfigError
from fedsplit.flower.strategy import SplitStrategy
from fedsplit.flower.strategy.round_policy import Share
from fedsplit.trunk.update import TrunkUpdate


class ReplicaUpdate(TrunkUpdate):
    """A step of each client's replica with that client's gradients alone."""

    replicas: ClassVar = True


class SplitFedV1(SplitStrategy):
    """`SplitStrategy` with a replica of the trunk for each client."""

    # Replicas are averaged when all clients of a round have finished it, as in the paper.
    policies: ClassVar = ("sync",)
    update: ClassVar = ReplicaUpdate

    def check(self) -> None:
        """Raise an error unless the trunk trains, each replica by itself.

        Raises:
            ConfigError: `train.mode` or `train.clients_per_pass` does not fit.
        """
        super().check()
        if self.run.train.mode != "joint":
            raise ConfigError(
                f"SplitFedV1 averages trunks that train, but with train.mode={self.run.train.mode} "
                "the trunk stays as it is; use strategy=splitfed_v2 or train.mode=joint"
            )
        if self.run.train.clients_per_pass > 1:
            raise ConfigError(
                f"train.clients_per_pass={self.run.train.clients_per_pass} has clients share a "
                "pass of one trunk, but SplitFedV1 gives each a replica of its own; use "
                "strategy=splitfed_v2 or clients_per_pass=1"
            )

    def after_merge(self, shares: Sequence[Share]) -> None:
        """Average the replicas with the weights of their clients."""
        self.trunk_server.service.average({share.work.client: share.weight for share in shares})
