"""What the engine's thread works on: parameters, graphs, and what sessions have accumulated.

Shapes: B sequences, T tokens, D hidden width. Knows no thread and no queue; who calls decides
when, and one thread alone calls.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from fedsplit.errors import BadTensor, CheckpointError, ConfigError, ProtocolError
from fedsplit.model.lora import trainable
from fedsplit.model.stage import TrunkPart
from fedsplit.spec import RunSpec
from fedsplit.trunk import aggregator
from fedsplit.trunk.batched_pass import BatchedForward, BatchedPass, Found
from fedsplit.trunk.call import Call, Kind
from fedsplit.trunk.compute import Compute
from fedsplit.trunk.guard import require_finite, require_like, require_plausible
from fedsplit.trunk.replica import Replica, Work
from fedsplit.trunk.stash import Graph, Stash
from fedsplit.trunk.update import StoredPass, TrunkUpdate
from fedsplit.trunk.versions import ParameterVersions
from fedsplit.wire.messages import (
    BackwardReply,
    ForwardReply,
    StepReply,
)

_SHARED, _REPLICA = "trunk/", "replica/"


class Training:
    """A trunk in training; see `fedsplit.trunk.engine.TrunkEngine` for the arguments.

    Without replicas there is one set of parameters and one barrier, the shared one. With them
    every client has a set and a barrier to itself, so that it waits for nobody, and the shared
    set is the mean as of the last `average`.
    """

    def __init__(
        self, trunk: TrunkPart, run: RunSpec, clock: Callable[[], float], update: type[TrunkUpdate]
    ) -> None:
        self._trunk = trunk
        self._run = run
        self._clock = clock
        self._update = update(run)
        self._compute = Compute(trunk, run)
        self._stash = Stash(run.wire.stash_bytes)
        self._trained = tuple(trainable(trunk))
        self._batched = BatchedPass(trunk, self._compute, self._trained)
        self._shared = self._new_replica(resident=True)
        self._replicas: dict[str, Replica] = {}
        self._works: dict[str, Work] = {}

    # --- how it stands ------------------------------------------------------------------------

    @property
    def barrier(self) -> aggregator.Barrier:
        """The barrier at which clients wait for one another."""
        return self._shared.barrier

    @property
    def version(self) -> int:
        """Optimizer steps taken, with replicas those of all."""
        return sum(replica.steps for replica in self._all())

    @property
    def steps(self) -> int:
        """Where the learning rate schedule stands: the clients' own count of optimizer steps."""
        return max(replica.position for replica in self._all())

    @property
    def stashed_bytes(self) -> int:
        """Activations that are kept for outstanding backwards."""
        return self._stash.num_bytes

    @property
    def clients_per_pass(self) -> int:
        """How many clients' forwards run at once, if that many are at work."""
        most = min(self._run.train.clients_per_pass, self.barrier.num_awaited)
        return most if most > 1 and self._batched.possible(self._shared.versions) else 1

    def gradients(self, session: str) -> dict[str, Tensor]:
        """What a session has accumulated since its last step, by parameter name."""
        work = self._works.get(session)
        return {k: v.cpu().clone() for k, v in work.gradients.items()} if work else {}

    # --- who takes part -----------------------------------------------------------------------

    def notify(self, event: aggregator.Expected | aggregator.Ticked, now: float) -> None:
        """Notify the barrier at which clients wait for one another."""
        if not self._update.replicas:
            self._shared.notify(event, now)

    def join(self, client: str, now: float) -> int:
        """Count a client in; the version it begins with."""
        replica = self._replica_of(client)
        replica.notify(aggregator.Joined(client=client), now)
        return replica.versions.current

    def leave(self, client: str, now: float) -> None:
        """Wait no longer for a client."""
        self._replica_of(client).notify(aggregator.Left(client=client), now)

    def with_current(self, work: Callable[[], None]) -> None:
        """Run `work` while the module holds the current version."""
        with self._shared.versions.installed(self._shared.versions.current):
            work()

    def forget(self, session: str) -> None:
        """Drop what is kept for a session; what it contributed stays."""
        self._unpin(self._stash.drop_session(session))
        if work := self._works.pop(session, None):
            work.end()

    def forget_client(self, client: str) -> None:
        """Drop the replica of a client that is gone; one that comes back begins with the mean."""
        if replica := self._replicas.pop(client, None):
            # The version counts the steps of all replicas, and must not fall.
            self._shared.steps += replica.steps
            self._shared.position = max(self._shared.position, replica.position)

    def drop_expired(self) -> None:
        """Drop graphs whose time is over."""
        self._unpin(self._stash.drop_expired(self._clock()))

    # --- forward, backward, step --------------------------------------------------------------

    def evaluate(self, call: Call) -> ForwardReply:
        """Run smashed data through, as in evaluation."""
        versions = self._replicas.get(call.client, self._shared).versions
        out_BTD = self._compute.evaluate(self._compute.inputs(call.request, ""), versions)
        return ForwardReply(
            trunk_out_BTD=out_BTD.cpu(), version=versions.current, codec=self._run.wire.down
        )

    def prepare_forward(self, call: Call) -> int:
        """Give a training forward what it runs on; how many calls are to share its pass.

        Raises:
            StaleVersion: The trunk has moved on too far since the session's step began.
            NonFinite: The smashed data holds NaN or Inf.
        """
        dropout = f"trunk/{self._run.seed}/{call.client}/{call.round}/{call.request.call}"
        call.inputs = self._compute.inputs(call.request, dropout)
        work = self._works.get(call.session)
        if work is None:
            work = self._works[call.session] = self._replica_of(call.client).begin()
        work.require_current(call.client)
        call.work, call.prepared = work, True
        return self.clients_per_pass

    def prepare_backward(self, call: Call) -> int:
        """Give a backward the graph that it runs through; how many calls are to share its pass.

        Raises:
            ActivationExpired: The graph is gone.
            FedsplitError: The gradient is refused.
        """
        grad_BTD = call.request.grad_trunk_out_BTD
        require_finite(grad_BTD, "grad_trunk_out_BTD")
        graph = self._stash.take(call.session, call.request.call)
        try:
            require_like(grad_BTD, graph.trunk_out_BTD)
        except BadTensor:
            self._unpin([graph])
            raise
        call.graph, call.prepared = graph, True
        return len(graph.batched.rows) if graph.batched and not graph.batched.broken else 1

    def forward(self, calls: Sequence[Call]) -> list[ForwardReply]:
        """Run smashed data through and keep the graphs; several calls are of one kind."""
        work = calls[0].work
        versions, version = work.replica.versions, work.version
        if len(calls) == 1:
            output = self._compute.forward(calls[0].inputs, versions, version)
            return [self._keep(calls[0], output.trunk_out_BTD, output.num_bytes)]
        batched = self._batched.forward([call.inputs for call in calls], versions, version)
        outs, num_bytes = batched.trunk_out_BTD.split(batched.rows), batched.num_bytes // len(calls)
        return [
            self._keep(call, out_BTD, num_bytes, batched=batched, place=place)
            for place, (call, out_BTD) in enumerate(zip(calls, outs, strict=True))
        ]

    def backward(self, calls: Sequence[Call]) -> list[BackwardReply]:
        """Run gradients back and accumulate the parameters'; several calls are of one pass.

        Where the pass had further members, each call's forward is run again, alone.
        """
        batched = calls[0].graph.batched
        try:
            if batched and len(calls) == len(batched.rows):
                graph = calls[0].graph
                versions, version = graph.replica.versions, graph.version
                grads = [call.request.grad_trunk_out_BTD for call in calls]
                found: Sequence[Found] = self._batched.backward(batched, grads, versions, version)
            else:
                found = [self._backward_alone(call) for call in calls]
            return [self._accumulate(call, *each) for call, each in zip(calls, found, strict=True)]
        finally:
            self.release(calls)

    def release(self, calls: Iterable[Call]) -> None:
        """Let the graphs of backwards go, which have run or will not."""
        self._unpin([call.graph for call in calls if call.kind is Kind.BACKWARD and call.prepared])

    def contribute(self, call: Call, now: float) -> StepReply:
        """Hand what a session accumulated to its barrier.

        Raises:
            StaleVersion: It is too old, or the client's second to this barrier.
            ProtocolError: There is none, or its counts cannot be.
        """
        work = self._works.get(call.session)
        if work is None or not work.num_positions:
            raise ProtocolError("there is nothing to step with: no backward since the last step")
        require_plausible(call.request, work.num_positions, self._run)
        del self._works[call.session]
        return work.replica.contribute(call.client, work, call.request, now)

    def step_if_due(self) -> None:
        """Take the steps that barriers have decided on."""
        for replica in self._all():
            # On a virtual clock a slow client's backward may come, in real time, after steps that
            # are long after it; what becomes of it is decided when its turn to step has come.
            if replica.step_if_due() and not self._run.policy.sim_slowdown:
                self._drop_outdated(replica)

    # --- all of it ----------------------------------------------------------------------------

    def average(self, weights: Mapping[str, float]) -> None:
        """Give every replica, and the shared set, the mean of these clients' parameters.

        Args:
            weights: By client; they sum to one. A client without a replica counts as the mean
                before.

        Raises:
            ConfigError: There are no replicas, or the weights do not sum to one.
        """
        if not self._update.replicas:
            raise ConfigError("this trunk has no replicas to average; set its update.replicas")
        if not math.isclose(math.fsum(weights.values()), 1.0, rel_tol=1e-6):
            raise ConfigError(f"the weights of an average sum to {sum(weights.values())}, not to 1")
        mean: dict[str, Tensor] = {}
        for client, weight in sorted(weights.items()):
            for name, value in self._replicas.get(client, self._shared).versions.values().items():
                part = value * weight
                mean[name] = mean[name].add_(part) if name in mean else part
        for replica in self._all():
            replica.versions.assign(mean)

    def state(self) -> dict[str, Tensor]:
        """A copy of all that training goes on from, by name, while nobody is at work."""
        owners = {_SHARED: self._shared}
        owners |= {f"{_REPLICA}{client}/": each for client, each in self._replicas.items()}
        return {
            prefix + name: tensor
            for prefix, replica in owners.items()
            for name, tensor in replica.state().items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` handed out.

        Raises:
            CheckpointError: It is not the state of such a trunk, or somebody is at work.
        """
        if self._works or len(self._stash):
            raise CheckpointError("somebody is at work; load the trunk's state between rounds")
        clients = {name.split("/")[1] for name in state if name.startswith(_REPLICA)}
        if clients and not self._update.replicas:
            raise CheckpointError(
                f"this state has a replica of the trunk for {min(clients)} and others, but here "
                "all share one; resume with the strategy it was saved with"
            )
        self._shared.load_state(_under(_SHARED, state))
        self._replicas.clear()
        for client in sorted(clients):
            self._replica_of(client).load_state(_under(f"{_REPLICA}{client}/", state))

    def _all(self) -> list[Replica]:
        return [self._shared, *self._replicas.values()]

    def _replica_of(self, client: str) -> Replica:
        if not self._update.replicas:
            return self._shared
        if client not in self._replicas:
            self._replicas[client] = self._new_replica(resident=False)
        return self._replicas[client]

    def _new_replica(self, *, resident: bool) -> Replica:
        versions = ParameterVersions(self._trunk, self._trained, self._run.train, resident=resident)
        return Replica(versions, self._run, self._compute, self._update)

    def _work_for(self, session: str, graph: Graph) -> Work:
        """The session's work; after a step since this graph, new work on the graph's version."""
        if session not in self._works:
            self._works[session] = Work(
                replica=graph.replica, version=graph.version, barrier_version=graph.barrier_version
            )
        work = self._works[session]
        work.barrier_version = min(work.barrier_version, graph.barrier_version)
        return work

    def _keep(
        self,
        call: Call,
        trunk_out_BTD: Tensor,
        num_bytes: int,
        batched: BatchedForward | None = None,
        place: int = 0,
    ) -> ForwardReply:
        """Keep the graph of a forward for its backward; the reply."""
        work = call.work
        graph = Graph(
            inputs=call.inputs,
            trunk_out_BTD=trunk_out_BTD,
            replica=work.replica,
            version=work.version,
            barrier_version=work.barrier_version,
            num_bytes=num_bytes,
            expires_at=self._clock() + self._run.wire.stash_ttl_s,
            batched=batched,
            place=place,
        )
        graph.replica.versions.pin(graph.version)
        self._unpin(self._stash.put(call.session, call.request.call, graph))
        return ForwardReply(
            trunk_out_BTD=trunk_out_BTD.detach().cpu(),
            version=graph.version,
            codec=self._run.wire.down,
        )

    def _backward_alone(self, call: Call) -> Found:
        graph = call.graph
        versions, version, out_BTD = graph.replica.versions, graph.version, graph.trunk_out_BTD
        if graph.batched:
            graph.batched.broken = True
            out_BTD = self._compute.forward(graph.inputs, versions, version).trunk_out_BTD
        leaves = versions.leaves(version)
        smashed = [graph.inputs.smashed_BTD] if call.request.want_grad else []
        found = self._compute.backward(
            out_BTD,
            [*leaves.values(), *smashed],
            call.request.grad_trunk_out_BTD,
            versions,
            version,
        )
        return dict(zip(leaves, found, strict=False)), found[-1] if smashed else None

    def _accumulate(
        self, call: Call, found: Mapping[str, Tensor | None], grad_smashed_BTD: Tensor | None
    ) -> BackwardReply:
        """Accumulate the parameters' gradients of a backward; the reply."""
        graph, grad_BTD = call.graph, call.request.grad_trunk_out_BTD
        work = self._work_for(call.session, graph)
        work.add(found, grad_BTD.shape[:2].numel())
        if self._update.keeps_passes:
            work.passes.append(StoredPass(inputs=graph.inputs, grad_trunk_out_BTD=grad_BTD))
        if not call.request.want_grad:
            grad_smashed_BTD = None
        return BackwardReply(
            grad_smashed_BTD=None if grad_smashed_BTD is None else grad_smashed_BTD.cpu(),
            trunk_sq_norm=work.sq_norm,
            codec=self._run.wire.grad_down,
        )

    def _drop_outdated(self, replica: Replica) -> None:
        """Let go of versions so old that nothing made with them would be taken."""
        # One version more than is taken is kept, so that who comes just too late is told so.
        barrier = replica.barrier.version - max(1, aggregator.oldest(self._run.policy))
        self._unpin(self._stash.drop_older(replica, barrier))
        for work in self._works.values():
            if work.replica is replica and work.barrier_version < barrier and not work.outdated:
                work.outdate()

    @staticmethod
    def _unpin(graphs: Iterable[Graph]) -> None:
        for graph in graphs:
            graph.replica.versions.unpin(graph.version)


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
