"""The baselines: the unsplit model, trained without a trunk by the loop of all strategies.

With `baseline=fedavg` each client trains the whole model and a Flower strategy averages them
(McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS, arXiv 1602.05629). `no_trunk` does the same with a model of the clients' own blocks alone,
so its difference to the split run is what the trunk was worth. With `local` each client keeps its
own model. With `central` one node trains the model on the union of all clients' batches. Data,
tokens, seeds and rounds are those of the split run.
"""

import time
from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor

from fedsplit.flower.reply import MAX_NUMBER
from fedsplit.flower.strategy.base import SplitStrategy
from fedsplit.flower.trunk_server import TrunkServer
from fedsplit.model.stage import TrunkPart
from fedsplit.telemetry.sinks import Telemetry
from fedsplit.trunk.norm_guard import GuardCounts
from fedsplit.trunk.work_counts import WorkCount


class Unsplit(SplitStrategy):
    """`SplitStrategy` without a trunk to serve."""

    def check(self) -> None:
        """Accept every policy; only `fedavg` and `no_trunk` use the client weights' strategy."""
        if self.run.baseline in ("fedavg", "no_trunk"):
            super().check()

    def make_server(self, trunk: TrunkPart) -> TrunkServer:
        """Return a stand-in that serves no trunk."""
        return cast(TrunkServer, NoTrunkHost())


class NoTrunkHost:
    """The interface of `TrunkServer`, its service and its engine, without a trunk."""

    address = ""
    version = short_steps = 0
    guard_counts = GuardCounts()

    @property
    def service(self) -> "NoTrunkHost":
        """The object itself."""
        return self

    # The interface is small, so one object is the server, its service, its engine and its counts.
    engine = work = service

    def __enter__(self) -> "NoTrunkHost":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def addresses_for(self, client: str) -> list[str]:
        """Return the empty address: no client calls a trunk."""
        return [self.address]

    def admit(self, client: str) -> str:
        """Return an empty token: no client calls a trunk."""
        return ""

    def renew(self) -> None:
        """Do nothing: there is no trunk."""

    def observe(self, telemetry: Telemetry) -> None:
        """Do nothing: no trunk has events."""

    def scale_lr(self, factor: float) -> None:
        """Do nothing: the clients have the only optimizers."""

    def expect(self, clients: Sequence[str], **_: object) -> None:
        """Do nothing: no barrier waits for clients."""

    def release(self, client: str) -> None:
        """Do nothing: no barrier waits for clients."""

    def forget(self, client: str) -> bool:
        """Return True: nothing is kept for a client."""
        return True

    def take(self, client: str) -> WorkCount:
        """Return a count that bounds no reply: nothing counts the work of a client here."""
        return WorkCount(steps=MAX_NUMBER, tokens=MAX_NUMBER, positions=MAX_NUMBER)

    def now(self) -> float:
        """Return seconds of a monotonic clock."""
        return time.monotonic()

    def state(self) -> dict[str, Tensor]:
        """Return no state."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load no state."""
