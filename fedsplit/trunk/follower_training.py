"""The training of a follower: its graphs and gradients are its own, its parameters the leader's."""

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fedsplit.trunk import aggregator
from fedsplit.trunk.call import Call
from fedsplit.trunk.replica import Replica
from fedsplit.trunk.training import Training
from fedsplit.wire.messages import StepRequest
from fedsplit.wire.server_messages import ContributeRequest


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
    shared: FollowedReplica

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._held: dict[str, float] = {}

    def take(self, call: Call) -> ContributeRequest:
        """Take what a session has accumulated, for the leader; its client is held back from now on.

        Raises:
            ProtocolError: There is nothing.
            StaleVersion: It is older than any that the leader would accept.
        """
        work, step = self.works.accumulated(call.session), call.request
        work.require_open(call.client)
        self.works.remove(call.session)
        work.end()
        # The version is not known before the leader's reply.
        self._hold(call.client, math.inf)
        return _contribution(
            call.session,
            step,
            work.num_positions,
            work.barrier_version,
            {name: gradient.cpu() for name, gradient in work.gradients.items()},
        )

    def accepted(self, client: str, version: int) -> None:
        """Hold a client back until this version has arrived."""
        self._hold(client, version)

    def refused(self, client: str) -> None:
        """Hold a client back no longer, because the leader did not accept its contribution."""
        self._hold(client, 0)

    def follow(self, values: Mapping[str, Tensor], version: int, barrier_version: int) -> None:
        """Take over the leader's parameters; clients whose version it is continue."""
        self.shared.follow(values, version, barrier_version)
        self._drop_outdated(self.shared)
        self._release()

    def release_all(self) -> None:
        """Hold nobody back, because the leader is another one."""
        self._held.clear()
        self._release()

    def _hold(self, client: str, version: float) -> None:
        self._held[client] = version
        self._release()

    def _release(self) -> None:
        current = self.shared.versions.current
        self._held = {c: version for c, version in self._held.items() if version > current}
        self.shared.holding(frozenset(self._held))


def _contribution(
    session: str,
    step: StepRequest,
    num_positions: int,
    barrier_version: int,
    gradients: Mapping[str, Tensor],
) -> ContributeRequest:
    return ContributeRequest(
        session=session,
        call=step.call,
        step=step.step,
        num_tokens=step.num_tokens,
        client_sq_norm=step.client_sq_norm,
        loss_scale=step.loss_scale,
        num_positions=num_positions,
        barrier_version=barrier_version,
        names=tuple(gradients),
        gradients=tuple(gradients.values()),
    )
