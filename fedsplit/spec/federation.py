"""The settings of a federation: the trunk's policy, client weights, and the training method."""

import math
from dataclasses import dataclass, field
from typing import Any

from fedsplit.errors import ConfigError
from fedsplit.spec.checks import at_least, one_of, positive

POLICIES = ("sync", "async", "quorum")
"""The names of the policies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """The policy that decides when the trunk steps and when a round closes.

    `sync` waits for all clients, `quorum` for `quorum` of them (a count if it is at least 1, else
    a fraction), and `async` for no client. At the trunk, a barrier waits at most `deadline_s`
    seconds after its first contribution. A round closes at most `round_deadline_s` seconds after
    it began; a reply that arrives later is merged into a later round.

    A contribution (a gradient at the trunk, client weights at the server) that is `s` versions
    old has the weight `discount_of(s)`, and is refused if `s` is above `max_staleness`. With
    `late=refuse`, the trunk of a quorum refuses every stale gradient. In `async`, client weights
    are mixed into those of the server with weight `mixing` times the discount (FedAsync),
    `buffer` of them at a time (FedBuff).

    `sim_slowdown` simulates machines of different speed: for each client that it names, the
    factor by which its machine is slower than a normal one. The trunk then has a virtual clock,
    on which a step of a normal machine takes one second, and handles requests in the order of
    that clock, so the run is reproducible under any policy. All times above are then in virtual
    seconds.
    """

    kind: str = "sync"
    deadline_s: float = 30.0
    round_deadline_s: float = 3600.0
    quorum: float = 0.8
    late: str = "discount"
    discount: str = "polynomial"
    discount_a: float = 0.5
    discount_b: float = 4.0
    max_staleness: int = 32
    mixing: float = 0.6
    buffer: int = 1
    sim_slowdown: dict[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        one_of("policy", self.kind, POLICIES)
        one_of("policy.late", self.late, ("discount", "refuse"))
        one_of("policy.discount", self.discount, ("constant", "polynomial", "hinge"))
        for name in ("deadline_s", "round_deadline_s", "quorum"):
            positive(f"policy.{name}", getattr(self, name))
        # From 1 on it is a count of clients.
        if self.quorum > 1 and self.quorum != int(self.quorum):
            raise ConfigError(
                f"policy.quorum={self.quorum} is neither a fraction (below 1) nor a whole number"
            )
        for name in ("discount_a", "discount_b", "max_staleness"):
            at_least(f"policy.{name}", getattr(self, name), 0)
        at_least("policy.buffer", self.buffer, 1)
        if not 0 < self.mixing <= 1:
            raise ConfigError(f"policy.mixing={self.mixing} is out of range; it must be in (0, 1]")
        for client, factor in self.sim_slowdown.items():
            at_least(f"policy.sim_slowdown of {client}", factor, 1)

    def quorum_of(self, num_clients: int) -> int:
        """Return the number of clients, out of `num_clients`, that a step or a round waits for.

        >>> PolicySpec(kind="quorum", quorum=0.75).quorum_of(5), PolicySpec().quorum_of(5)
        (4, 5)
        """
        if self.kind == "sync":
            return num_clients
        if self.kind == "async":
            return min(1, num_clients)
        wanted = self.quorum if self.quorum >= 1 else math.ceil(self.quorum * num_clients)
        return min(int(wanted), num_clients)

    def discount_of(self, staleness: int) -> float:
        """Return the weight of a contribution that is `staleness` versions old, in (0, 1].

        Xie, Koyejo and Gupta 2019, "Asynchronous Federated Optimization", arXiv 1903.03934, 5.2.

        >>> PolicySpec(discount="polynomial", discount_a=0.5).discount_of(3)
        0.5
        """
        if self.discount == "constant":
            return 1.0
        if self.discount == "polynomial":
            return float((staleness + 1) ** -self.discount_a)
        over = staleness - self.discount_b
        return 1.0 if over <= 0 else 1.0 / (self.discount_a * over + 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientWeightsSpec:
    """The treatment of client weights: aggregated by a Flower strategy, or personal.

    `strategy` is the import path of any Flower strategy, and `options` are its arguments.
    Personal parts (`personal`: bottom, top or both) never leave their client.
    """

    strategy: str = "flwr.serverapp.strategy.FedAvg"
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    personal: str = "none"

    def __post_init__(self) -> None:
        one_of("client_weights.personal", self.personal, ("none", "bottom", "top", "both"))

    def is_personal(self, place: str) -> bool:
        """Return whether the part `place`, bottom or top, never leaves its client."""
        return self.personal in (place, "both")


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategySpec:
    """The training method: the import path of a Flower strategy for split models."""

    target: str = "strategies.SplitFedV2"
