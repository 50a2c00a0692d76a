"""The replicas of a trunk: the shared set of parameters, and with some methods one per client."""

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from statistics import median_low

from torch import Tensor

from fedsplit.errors import CheckpointError, ConfigError
from fedsplit.spec import GuardSpec
from fedsplit.trunk.replica import Replica
from fedsplit.trunk.schedule import Schedule
from fedsplit.trunk.versions import PARAMETER

log = logging.getLogger(__name__)

_SHARED, _REPLICA = "trunk/", "replica/"
TRAINED = _SHARED + PARAMETER
"""The prefix, in a state, of the names of the parameters that all clients share."""


class Replicas:
    """The shared replica, and the replicas of clients.

    Args:
        new: Returns a new replica; its argument says whether the module itself holds it.
        one_each: Whether every client trains a replica of its own.
        guard: The bounds of what a mean takes.

    Attributes:
        shared: The replica that all clients train, or the mean of the last `average`.
    """

    def __init__(self, new: Callable[[bool], Replica], *, one_each: bool, guard: GuardSpec) -> None:
        self.shared = new(True)
        self._guard = guard
        self._new = new
        self._one_each = one_each
        self._own: dict[str, Replica] = {}

    def __iter__(self) -> Iterator[Replica]:
        yield self.shared
        # A copy, because another thread may ask for counts.
        yield from tuple(self._own.values())

    @property
    def num_own(self) -> int:
        """The number of clients that have a replica of their own."""
        return len(self._own)

    @property
    def version(self) -> int:
        """The number of optimizer steps taken, summed over replicas."""
        return sum(replica.steps for replica in self)

    @property
    def position(self) -> int:
        """The position of the learning rate schedule: the largest step count of the clients."""
        return max(replica.schedule.position for replica in self)

    def of(self, client: str) -> Replica:
        """Return the replica that a client trains."""
        if not self._one_each:
            return self.shared
        if client not in self._own:
            self._own[client] = self._new(False)
            # A client whose replica was dropped continues its schedule when it comes back.
            self._own[client].schedule = Schedule(self.shared.schedule.position)
        return self._own[client]

    def read_by(self, client: str) -> Replica:
        """Return the replica that a client evaluates."""
        return self._own.get(client, self.shared)

    def forget(self, client: str) -> None:
        """Drop the replica of a client; a client that returns begins with the mean."""
        if replica := self._own.pop(client, None):
            # The version counts the steps of all replicas, and must not fall.
            self.shared.steps += replica.steps
            position = max(self.shared.schedule.position, replica.schedule.position)
            self.shared.schedule.position = position
        self.shared.schedule.forget(client)

    def average(self, weights: Mapping[str, float]) -> None:
        """Set every replica and the shared one to the mean of these clients' parameters.

        Args:
            weights: The weight of each client; they sum to one. A client without a replica counts
                with the previous mean, as does one whose replica is out of proportion.

        Raises:
            ConfigError: There are no replicas, or the weights do not sum to one.
        """
        if not self._one_each:
            raise ConfigError("this trunk has no replicas to average; set its update.replicas")
        if not math.isclose(math.fsum(weights.values()), 1.0, rel_tol=1e-6):
            raise ConfigError(f"the weights of an average sum to {sum(weights.values())}, not to 1")
        mean: dict[str, Tensor] = {}
        left_out = self._out_of_proportion(weights)
        # Sorted, because the order of a floating-point sum changes its result.
        for client, weight in sorted(weights.items()):
            replica = self.shared if client in left_out else self.read_by(client)
            for name, value in replica.versions.values().items():
                part = value * weight
                mean[name] = mean[name].add_(part) if name in mean else part
        for replica in self:
            replica.versions.assign(mean, replica.versions.current + 1)

    def _out_of_proportion(self, clients: Collection[str]) -> set[str]:
        """Return the clients whose replica has changed far more than most, or holds NaN or Inf."""
        base, layout = self.shared.versions.values(), self.shared.versions.layout
        changes = {
            client: math.sqrt(
                layout.squared_norm({k: v - base[k] for k, v in own.versions.values().items()})
            )
            for client, own in self._own.items()
            if client in clients
        }
        finite = [change for change in changes.values() if math.isfinite(change)]
        most = self._guard.refuse_above * median_low(finite) if finite else 0.0
        found = {
            client
            for client, change in changes.items()
            if not math.isfinite(change) or 0 < most < change
        }
        for client in sorted(found):
            log.warning("the replica of %s changed by %g and is left out", client, changes[client])
        return found

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the state of all replicas, by name."""
        owners = {_SHARED: self.shared}
        owners |= {f"{_REPLICA}{client}/": each for client, each in self._own.items()}
        return {
            prefix + name: tensor
            for prefix, replica in owners.items()
            for name, tensor in replica.state().items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state that `state` returned.

        Raises:
            CheckpointError: It is not the state of such a trunk.
        """
        clients = {name.split("/")[1] for name in state if name.startswith(_REPLICA)}
        if clients and not self._one_each:
            raise CheckpointError(
                f"this state has a replica of the trunk for {min(clients)}, but the clients of "
                "this trunk share its parameters; resume with the strategy it was saved with"
            )
        self.shared.load_state(_under(_SHARED, state))
        self._own.clear()
        for client in sorted(clients):
            self.of(client).load_state(_under(f"{_REPLICA}{client}/", state))


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
