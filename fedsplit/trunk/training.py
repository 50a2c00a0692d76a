"""The state of a trunk in training: parameters, graphs, and the gradients of sessions.

Shapes: B sequences, T tokens, D hidden width. There is no thread and no queue here; only the
engine's thread calls it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

from torch import Tensor

from fedsplit.errors import BadTensor, CheckpointError
from fedsplit.model.lora import trainable
from fedsplit.model.stage import TrunkPart
from fedsplit.spec import RunSpec
from fedsplit.telemetry.events import CacheState, StepTaken
from fedsplit.trunk import aggregator
from fedsplit.trunk.batched_pass import BackwardResult, BatchedForward, BatchedPass
from fedsplit.trunk.call import Call, Kind
from fedsplit.trunk.compute import Compute
from fedsplit.trunk.guard import counted, require_finite, require_like, require_plausible
from fedsplit.trunk.norm_guard import Quarantine
from fedsplit.trunk.refusals import Refusals
from fedsplit.trunk.replica import Replica
from fedsplit.trunk.replicas import Replicas
from fedsplit.trunk.shards import ShardLayout
from fedsplit.trunk.stash import Graph, Stash
from fedsplit.trunk.update import StoredPass, TrunkUpdate
from fedsplit.trunk.versions import ParameterVersions
from fedsplit.trunk.works import Works
from fedsplit.wire.messages import BackwardReply, ForwardReply, StepReply


class Training:
    """A trunk in training; see `fedsplit.trunk.engine.TrunkEngine` for the arguments.

    Without replicas, all clients share one set of parameters and one barrier. With replicas, each
    has its own and waits for no other, and the shared set is the mean of the last `average`.

    Attributes:
        shared: The replica that all clients share.
        works: What each session has accumulated since its last step.
        new_replica: The class of the replicas.
        orders: The names of the methods that are orders.
    """

    new_replica: ClassVar[type[Replica]] = Replica
    orders: ClassVar[tuple[str, ...]] = ("average", "gradients", "receive", "state", "load_state")

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
        self._layout = ShardLayout(trunk, self._trained)
        self._batched = BatchedPass(trunk, self._compute, self._trained)
        is_own = self._update.replicas
        self._replicas = Replicas(self._new_replica, one_each=is_own, guard=run.guard)
        self.shared = self._replicas.shared
        self.works = Works()
        self.quarantine = Quarantine(run.guard, run.limits.clients)
        self.lr_scale = 1.0
        # At no time: the departure itself must not reach the deadline of the barrier.
        exclude = partial(self.leave, now=-math.inf)
        self._refusals = Refusals(run, self.quarantine, clock, exclude)

    # --- state --------------------------------------------------------------------------------

    @property
    def barrier(self) -> aggregator.Barrier:
        """The barrier at which clients wait for one another."""
        return self.shared.barrier

    @property
    def version(self) -> int:
        """The number of optimizer steps taken, summed over replicas."""
        return self._replicas.version

    @property
    def steps(self) -> int:
        """The position of the learning rate schedule: the largest step count of the clients."""
        return self._replicas.position

    @property
    def stash_state(self) -> CacheState:
        """The graphs that are kept for outstanding backwards; any thread may ask."""
        return self._stash.state

    @property
    def num_present(self) -> int:
        """The number of clients that are in the middle of training; any thread may ask."""
        return sum(len(replica.barrier.present) for replica in self._replicas)

    @property
    def num_replicas(self) -> int:
        """The number of clients that have a replica of their own."""
        return self._replicas.num_own

    @property
    def clients_per_pass(self) -> int:
        """The number of clients whose forwards run as one pass."""
        # No more than are at work, because a pass would wait for others in vain.
        most = min(self._run.train.clients_per_pass, self.barrier.num_awaited)
        return most if most > 1 and self._batched.possible(self.shared.versions) else 1

    def gradients(self, session: str) -> dict[str, Tensor]:
        """Return the gradients of a session since its last step, by parameter name."""
        return self.works.gradients(session)

    # --- clients and sessions -----------------------------------------------------------------

    def is_excluded(self, client: str) -> bool:
        """Return whether a client is in quarantine."""
        return not self.quarantine.is_free(client, self._clock())

    def notify(self, event: aggregator.Expected | aggregator.Ticked, now: float) -> None:
        """Notify the barrier at which clients wait for one another."""
        if isinstance(event, aggregator.Expected):
            invited = {each for each in event.clients if not self.is_excluded(each)}
            event = replace(event, clients=frozenset(invited))
        # A client with a replica is the only one at its barrier, and waits for no event.
        if not self._update.replicas:
            self.shared.notify(event, now)

    def join(self, client: str, now: float) -> int:
        """Add a client to its barrier; return the version that it begins with.

        Raises:
            Quarantined: The client is in quarantine.
        """
        self.quarantine.require_free(client, self._clock())
        replica = self._replicas.of(client)
        replica.notify(aggregator.Joined(client=client), now)
        return replica.versions.current

    def leave(self, client: str, now: float) -> None:
        """Remove a client from its barrier."""
        self._replicas.of(client).notify(aggregator.Left(client=client), now)

    def with_current(self, work: Callable[[], None]) -> None:
        """Run `work` while the module holds the current version."""
        with self.shared.versions.installed(self.shared.versions.current):
            work()

    def forget(self, session: str) -> None:
        """Drop the graphs and gradients of a session; its contributions remain."""
        self._unpin(self._stash.drop_session(session))
        self._refusals.forget(session)
        self.works.end(session)

    def forget_client(self, client: str) -> None:
        """Drop the replica of a client; a client that returns begins with the mean."""
        self._replicas.forget(client)

    def drop_expired(self) -> None:
        """Drop expired graphs."""
        self._unpin(self._stash.drop_expired(self._clock()))

    # --- forward, backward, step --------------------------------------------------------------

    def evaluate(self, call: Call) -> ForwardReply:
        """Run smashed data through the trunk without a graph."""
        versions = self._replicas.read_by(call.client).versions
        inputs = self._compute.inputs(call.request, call.client, call.round)
        out_BTD = self._compute.evaluate(inputs, versions)
        version, codec = versions.current, self._run.wire.down
        return ForwardReply(trunk_out_BTD=out_BTD.cpu(), version=version, codec=codec)

    def prepare_forward(self, call: Call) -> int:
        """Set a training forward's inputs and work; return the number of calls of its pass.

        Raises:
            StaleVersion: The trunk has taken too many steps since the session's step began.
            TooLarge: The step keeps as many activations as a client's step may.
            NonFinite: The smashed data holds NaN or Inf.
            Quarantined: The client is in quarantine.
        """
        with self._refusals.counted(call.client, call.session, call.request.autocast):
            call.inputs = self._compute.inputs(call.request, call.client, call.round)
        work = self.works.begun(call.session, self._replicas.of(call.client))
        work.require_open(call.client)
        call.work, call.prepared = work, True
        return self.clients_per_pass

    def prepare_backward(self, call: Call) -> int:
        """Set a backward's graph; return the number of calls of its pass.

        Raises:
            ActivationExpired: The graph is gone.
            FedsplitError: The gradient is refused.
        """
        grad_BTD = call.request.grad_trunk_out_BTD
        with self._refusals.counted(call.client, call.session):
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
        """Run smashed data through the trunk and keep the graphs; all calls have one batch key."""
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
        """Run gradients back and accumulate those of the parameters; all calls are of one pass.

        If the pass had further members, each call's forward runs again, alone.
        """
        batched = calls[0].graph.batched
        try:
            if batched and len(calls) == len(batched.rows):
                graph = calls[0].graph
                versions, version = graph.replica.versions, graph.version
                grads = [call.request.grad_trunk_out_BTD for call in calls]
                results = self._batched.backward(batched, grads, versions, version)
            else:
                results = [self._backward_alone(call) for call in calls]
            return [self._accumulate(*each) for each in zip(calls, results, strict=True)]
        finally:
            self.release(calls)

    def release(self, calls: Iterable[Call]) -> None:
        """Unpin the versions of backwards that have run or were withdrawn."""
        self._unpin([call.graph for call in calls if call.kind is Kind.BACKWARD and call.prepared])

    def contribute(self, call: Call, now: float) -> StepReply:
        """Contribute the gradients of a session to its barrier.

        Raises:
            StaleVersion: They are too old, or the client's second ones for this barrier.
            ProtocolError: There are none, or the counts of the request are impossible.
            FedsplitError: The guard refuses them, or the client.
        """
        work = self.works.accumulated(call.session)
        with self._refusals.counted(call.client, call.session):
            require_plausible(call.request, work.num_positions, self._run)
            call.request = counted(call.request, self._run)
            self.works.remove(call.session)
            call.work = work
            usual = work.replica.guard.bounds_of(call.client)
            bounds = self.quarantine.bounds_of(call.client, usual)
            reply = work.replica.contribute(call.client, work, call.request, bounds, now)
        self.quarantine.accept(call.client, clipped=work.is_clipped)
        return reply

    def receive(
        self, session: str, positions: int, barrier_version: int, gradients: Mapping[str, Tensor]
    ) -> None:
        """Set what a session has accumulated, to whole gradients that a follower has sent."""
        work = self.shared.begin()
        work.barrier_version = min(work.barrier_version, barrier_version)
        work.add(self.shared.versions.shards(gradients), positions)
        self.works.put(session, work)

    def step_if_due(self) -> list[StepTaken]:
        """Take the steps that barriers have decided on; return them."""
        steps = []
        for replica in self._replicas:
            # On a virtual clock, a slow client's backward may arrive after steps of a later virtual
            # time. Its staleness is decided at the virtual time of its own step.
            if step := replica.step_if_due(self.lr_scale):
                steps.append(step)
                if not self._run.policy.sim_slowdown:
                    self._drop_outdated(replica)
        return steps

    # --- replicas and checkpoints -------------------------------------------------------------

    def average(self, weights: Mapping[str, float]) -> None:
        """Set every replica and the shared one to a mean; see `Replicas.average`."""
        self._replicas.average(weights)

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the state of training, by name; no client may be at work."""
        return self._replicas.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state that `state` returned.

        Raises:
            CheckpointError: It is not the state of such a trunk, or a client is at work.
        """
        if self.works or len(self._stash):
            raise CheckpointError(
                f"the trunk's state cannot be loaded while clients are at work ({len(self.works)} "
                f"sessions, {len(self._stash)} graphs); load it between rounds"
            )
        self._replicas.load_state(state)

    def _new_replica(self, resident: bool) -> Replica:
        versions = ParameterVersions(
            self._trunk, self._trained, self._run.train, resident=resident, layout=self._layout
        )
        return self.new_replica(
            versions,
            self._run,
            self._compute,
            self._update,
            on_clipped=lambda client: self.quarantine.accept(client, clipped=True),
        )

    def _keep(
        self,
        call: Call,
        trunk_out_BTD: Tensor,
        num_bytes: int,
        batched: BatchedForward | None = None,
        place: int = 0,
    ) -> ForwardReply:
        """Keep the graph of a forward for its backward; return the reply."""
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
        # Pinned before others are dropped, which may be the last ones of this version.
        graph.replica.versions.pin(graph.version)
        self._unpin(self._stash.put(call.session, call.request.call, graph))
        return ForwardReply(
            trunk_out_BTD=trunk_out_BTD.detach().cpu(),
            version=graph.version,
            codec=self._run.wire.down,
        )

    def _backward_alone(self, call: Call) -> BackwardResult:
        graph = call.graph
        versions, version, out_BTD = graph.replica.versions, graph.version, graph.trunk_out_BTD
        # The shared graph would give the gradients of all members, so the forward runs again.
        if graph.batched:
            graph.batched.broken = True
            out_BTD = self._compute.forward(graph.inputs, versions, version).trunk_out_BTD
        leaves = versions.leaves(version)
        smashed = [graph.inputs.smashed_BTD] if call.request.want_grad else []
        gradients = self._compute.backward(
            out_BTD,
            [*leaves.values(), *smashed],
            call.request.grad_trunk_out_BTD,
            versions,
            version,
        )
        # Not strict: the last gradient is that of the smashed data, if it is wanted.
        return dict(zip(leaves, gradients, strict=False)), gradients[-1] if smashed else None

    def _accumulate(self, call: Call, result: BackwardResult) -> BackwardReply:
        """Accumulate the parameters' gradients of a backward; return the reply."""
        gradients, grad_smashed_BTD = result
        graph, grad_BTD = call.graph, call.request.grad_trunk_out_BTD
        work = self.works.continued(call.session, graph)
        work.add(gradients, grad_BTD.shape[:2].numel())
        if self._update.keeps_passes:
            work.passes.append(StoredPass(inputs=graph.inputs, grad_trunk_out_BTD=grad_BTD))
        wanted_BTD = grad_smashed_BTD if call.request.want_grad else None
        return BackwardReply(
            grad_smashed_BTD=None if wanted_BTD is None else wanted_BTD.cpu(),
            trunk_sq_norm=work.sq_norm,
            codec=self._run.wire.grad_down,
        )

    def _drop_outdated(self, replica: Replica) -> None:
        """Unpin versions that are too old for any contribution."""
        # One version more is kept, so that a step that is just too late gets StaleVersion.
        barrier = replica.barrier.version - max(1, aggregator.oldest(self._run.policy))
        self._unpin(self._stash.drop_older(replica, barrier))
        self.works.outdate(replica, barrier)

    @staticmethod
    def _unpin(graphs: Iterable[Graph]) -> None:
        for graph in graphs:
            graph.replica.versions.unpin(graph.version)
