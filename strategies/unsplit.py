"""The baselines: the unsplit model, trained without a trunk by the loop of all methods.

With `baseline=fedavg` each client trains the whole model and a Flower strategy averages them
(McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS, arXiv 1602.05629); with `local` each keeps its own; with `central` one node trains it on
the union of all clients' batches. Data, tokens, seeds and rounds are those of the split run.
"""

import time
from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor

from fedsplit.flower.hosting import TrunkHost
from fedsplit.model.hollow import TrunkPart
from strategies.base import SplitStrategy


class Unsplit(SplitStrategy):
    """The base, with nothing to host."""

    def check(self) -> None:
        """Any policy that closes rounds goes with it, but the wrapped strategy has to be used."""
        if self.run.baseline == "fedavg":
            super().check()

    def make_host(self, trunk: TrunkPart) -> TrunkHost:
        """Nobody serves anything."""
        return cast(TrunkHost, NoHost())


class NoHost:
    """What a method asks of a `TrunkHost`, its service and its engine, where there is no trunk."""

    address = ""
    version = 0

    @property
    def service(self) -> "NoHost":
        """There is nothing behind it."""
        return self

    engine = service

    def __enter__(self) -> "NoHost":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def admit(self, client: str) -> str:
        """No token is needed where nobody is called."""
        return ""

    def expect(self, clients: Sequence[str], **_: object) -> None:
        """Nothing waits for them."""

    def release(self, client: str) -> None:
        """Nothing waits for it."""

    def now(self) -> float:
        """Seconds that do not run backwards."""
        return time.monotonic()

    def state(self) -> dict[str, Tensor]:
        """There is nothing to go on from."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """There is nothing to take over."""
