"""The training of a follower: its graphs and gradients are its own, its parameters the leader's."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedsplit.errors import ModelMismatch
from fedsplit.trunk import aggregator
from fedsplit.trunk.replica import Replica
from fedsplit.trunk.training import Training


class FollowedReplica(Replica):
    """A copy of the leader's replica; it takes no step.

    Its barrier holds back the forwards of a client from the client's contribution until the version
    that is made of it has arrived.
    """

    def notify(self, event: aggregator.Event, now: float) -> aggregator.Decision:
        """Note who is at work here; the leader's barrier decides when to step."""
        present = self.barrier.present
        if isinstance(event, aggregator.Joined):
            present |= {event.client}
        elif isinstance(event, aggregator.Left):
            present -= {event.client}
        self.barrier = replace(self.barrier, present=present)
        return aggregator.Wait()

    def holding(self, clients: frozenset[str]) -> None:
        """Hold back the forwards of these clients, and of no others."""
        held = tuple(
            aggregator.Contribution(client=client, num_tokens=0, discount=1.0)
            for client in sorted(clients)
        )
        self.barrier = replace(self.barrier, contributions=held)

    def follow(self, values: Mapping[str, Tensor], version: int, barrier_version: int) -> None:
        """Take over the leader's parameters."""
        self.versions.assign(values, version)
        self.steps = version
        self.barrier = replace(self.barrier, version=barrier_version)


class FollowerTraining(Training):
    """A trunk in training at a follower; see `Training`."""

    new_replica = FollowedReplica
    orders = (*Training.orders, "take", "accepted", "refused", "follow")
    shared: FollowedReplica

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._held: dict[str, float] = {}

    def take(self, client: str, session: str) -> tuple[int, int, dict[str, Tensor]]:
        """Take what a session has accumulated, for the leader; its client is held back from now on.

        Returns:
            The `num_positions` and the `barrier_version` of the work, and its whole gradients.

        Raises:
            ProtocolError: There is nothing.
            StaleVersion: It is older than any that the leader would accept.
        """
        work = self.works.accumulated(session)
        work.require_open(client)
        gradients = self.works.gradients(session)
        self.works.end(session)
        # The version is not known before the leader's reply.
        self._hold(client, math.inf)
        return work.num_positions, work.barrier_version, gradients

    def accepted(self, client: str, version: int) -> None:
        """Hold a client back until this version has arrived."""
        self._hold(client, version)

    def refused(self, client: str) -> None:
        """Hold a client back no longer, because the leader did not accept its contribution."""
        self._hold(client, 0)

    def follow(
        self, version: int, barrier_version: int, is_new: bool, values: Mapping[str, Tensor]
    ) -> None:
        """Take over the leader's parameters; clients whose version it is continue.

        Args:
            version: The leader's version.
            barrier_version: The number of barriers that had closed at the leader.
            is_new: Whether the leader is another one, which holds nobody back.
            values: The whole tensors by name.

        Raises:
            ModelMismatch: They are not those that this trunk trains.
        """
        _require_same(self.shared.versions.kinds(), values)
        if is_new:
            self._held.clear()
        self.shared.follow(values, version, barrier_version)
        self._drop_outdated(self.shared)
        self._release()

    def _hold(self, client: str, version: float) -> None:
        self._held[client] = version
        self._release()

    def _release(self) -> None:
        current = self.shared.versions.current
        self._held = {c: version for c, version in self._held.items() if version > current}
        self.shared.holding(frozenset(self._held))


def _require_same(
    kinds: Mapping[str, tuple[torch.dtype, torch.Size]], values: Mapping[str, Tensor]
) -> None:
    theirs = {name: (value.dtype, value.shape) for name, value in values.items()}
    if different := sorted(dict(kinds.items() ^ theirs.items())):
        raise ModelMismatch(
            f"the leader trains other parameters than this server ({different[0]} is not the same "
            "at both); start both with the same model, cut and settings"
        )
