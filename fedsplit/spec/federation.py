"""The settings of a federation: the trunk's policy, client weights, and the training method."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

from fedsplit.errors import ConfigError
from fedsplit.spec.checks import DURATION, AtLeast, Each, OneOf, Positive, check_fields

POLICIES = ("sync", "async", "quorum")
"""The names of the policies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """The policy that decides when the trunk steps and when a round closes.

    A contribution is a gradient at the trunk, or client weights at the server. It is stale if it
    was computed from an earlier version of the parameters.

    Attributes:
        kind: The clients that a trunk step and a round wait for: all (sync), policy.quorum of
            them (quorum), or none (async).
        deadline_s (seconds): The longest wait of a trunk step after its first contribution.
        round_deadline_s (seconds): The longest time of a round. A reply that arrives later is
            merged into a later round.
        quorum (clients): The size of a quorum: a count if it is at least 1, else a fraction.
        late: What the trunk of a quorum does with a stale gradient.
        discount: How the weight of a contribution falls with its age of s versions: not at all
            (constant), as (s + 1) ** -discount_a (polynomial), or as
            1 / (discount_a * (s - discount_b) + 1) from discount_b versions on (hinge).
        discount_a: The strength of the discount.
        discount_b (versions): The age at which the discount of hinge begins.
        max_staleness (versions): The age above which a contribution is refused.
        missing: What sync does about a client that is gone or fails. The round counts without the
            client (drop), or the run waits for it and repeats the round from the last checkpoint
            (wait): for at most policy.round_deadline_s, and at most three times in a row.
        combine: How the trunk combines the gradients of a step: their mean, weighted by tokens, or
            without weights the median of each number (median) or its mean without the largest and
            smallest quarter (trimmed).
        mixing: The weight, before the discount, with which async mixes client weights into those
            of the server (FedAsync).
        buffer (replies): The number of client weights that async mixes at a time (FedBuff).
        sim_slowdown: Simulates machines of different speed: for each client that it names, such
            as client-0, the factor by which its machine is slower than a normal one. The trunk
            then has a virtual clock, on which a step of a normal machine takes one second, and
            handles requests in its order, so that the run is reproducible under any policy. The
            times of the policy are then in virtual seconds.
    """

    kind: Annotated[str, OneOf(*POLICIES)] = "sync"
    deadline_s: Annotated[float, DURATION] = 30.0
    round_deadline_s: Annotated[float, DURATION] = 3600.0
    quorum: Annotated[float, Positive()] = 0.8
    late: Annotated[str, OneOf("discount", "refuse")] = "discount"
    discount: Annotated[str, OneOf("constant", "polynomial", "hinge")] = "polynomial"
    discount_a: Annotated[float, AtLeast(0)] = 0.5
    discount_b: Annotated[float, AtLeast(0)] = 4.0
    max_staleness: Annotated[int, AtLeast(0)] = 32
    missing: Annotated[str, OneOf("drop", "wait")] = "drop"
    combine: Annotated[str, OneOf("mean", "median", "trimmed")] = "mean"
    mixing: Annotated[float, Positive(most=1)] = 0.6
    buffer: Annotated[int, AtLeast(1)] = 1
    sim_slowdown: Annotated[dict[str, float], Each(AtLeast(1, most=1_000_000))] = field(
        default_factory=dict, hash=False
    )

    def __post_init__(self) -> None:
        check_fields(self, "policy")
        if self.combine != "mean" and self.kind == "async":
            raise ConfigError(
                f"policy.combine={self.combine} combines several gradients, and policy=async steps "
                "with one; use policy.combine=mean, policy=sync or policy=quorum"
            )
        if self.missing == "wait" and self.kind != "sync":
            raise ConfigError(
                f"policy.missing=wait waits for all clients, and policy={self.kind} does not; use "
                "policy.missing=drop or policy=sync"
            )
        # From 1 on it is a count of clients.
        if self.quorum > 1 and self.quorum != int(self.quorum):
            raise ConfigError(
                f"policy.quorum={self.quorum} is neither a fraction (below 1) nor a whole number"
            )

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

    Attributes:
        strategy: The import path of the Flower strategy that aggregates client weights.
        options: The arguments of that strategy.
        wrap: The import path of a wrapper of Flower that clips each client's change of the weights
            and adds noise to the mean, so that readers of the weights learn less of a client; empty
            for none.
        wrap_options: The arguments of the wrapper, such as noise_multiplier and clipping_norm. An
            accountant has target_delta and, for a budget that ends training, max_epsilon.
        personal: The parts that never leave their client.
        sealed: Whether clients seal what they send under a key that the server does not have. The
            server adds the weights (FedAvg), and only clients can join the trained model.
    """

    strategy: str = "flwr.serverapp.strategy.FedAvg"
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    wrap: str = ""
    wrap_options: dict[str, Any] = field(default_factory=dict, hash=False)
    personal: Annotated[str, OneOf("none", "bottom", "top", "both")] = "none"
    sealed: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "client_weights")

    def is_personal(self, place: str) -> bool:
        """Return whether the part `place`, bottom or top, never leaves its client."""
        return self.personal in (place, "both")


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategySpec:
    """The training method.

    Attributes:
        target: The import path of a Flower strategy for split models.
    """

    target: str = "strategies.SplitFedV2"
