"""A replica: one set of the trunk's parameters, and the barrier of the clients that train it.

A session accumulates gradients in its `Work` between two steps. A step request turns the work into
a `Contribution`, which waits until the aggregator decides to step.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedsplit.errors import StaleVersion, TooLarge
from fedsplit.optimization import clip_coefficient, unscale
from fedsplit.spec import RunSpec
from fedsplit.telemetry.events import StepTaken
from fedsplit.trunk import aggregator
from fedsplit.trunk.combine import Gradients
from fedsplit.trunk.compute import Compute
from fedsplit.trunk.guard import require_finite
from fedsplit.trunk.norm_guard import Bounds, NormGuard, require_in_proportion
from fedsplit.trunk.schedule import Schedule
from fedsplit.trunk.update import (
    Contribution,
    StoredPass,
    TrunkStep,
    TrunkUpdate,
    accumulate,
    clip,
    total_sq_norm,
)
from fedsplit.trunk.versions import ParameterVersions
from fedsplit.wire.messages import StepReply, StepRequest

_GUARD = "guard/"


@dataclass(slots=True, kw_only=True, eq=False)
class Work:
    """The gradients of one session since its last step, all of one version.

    `barrier_version` is the number of barriers that had closed when the work began,
    `num_positions` the sequences times tokens of its backwards, and `sq_norm` the squared norm of
    its `gradients`. Work that is `outdated` has lost its version and cannot continue; that which
    `is_clipped` was changed by the guard. `staleness` is the number of barriers that had closed
    since the work began when it was contributed.
    """

    replica: "Replica"
    version: int
    barrier_version: int
    gradients: Gradients = field(default_factory=dict)
    num_positions: int = 0
    sq_norm: float = 0.0
    passes: list[StoredPass] = field(default_factory=list)
    outdated: bool = False
    is_clipped: bool = False
    staleness: int = 0

    def __post_init__(self) -> None:
        self.replica.versions.pin(self.version)

    def add(self, gradients: Mapping[str, Tensor | None], num_positions: int) -> None:
        """Accumulate the gradients of a backward over `num_positions` sequences times tokens."""
        self.num_positions += num_positions
        accumulate(self.gradients, gradients)
        # Once for each backward: the reply reports it, and the step uses it again.
        self.sq_norm = self.replica.versions.layout.squared_norm(self.gradients)

    def end(self) -> None:
        """Unpin the version."""
        if not self.outdated:
            self.replica.versions.unpin(self.version)

    def outdate(self) -> None:
        """Unpin the version and drop the gradients; the next call of this work fails."""
        self.end()
        self.outdated = True
        self.gradients.clear()

    def require_open(self, client: str) -> None:
        """Refuse a further forward of outdated work, or of work that keeps all that it may.

        Raises:
            StaleVersion: The work is outdated.
            TooLarge: It keeps the activations of as many positions as a step of the run has.
        """
        if self.outdated:
            raise StaleVersion(
                f"{client} began this step with version {self.barrier_version}, but the trunk is "
                f"at {self.replica.barrier.version}; repeat the step"
            )
        most = self.replica.positions_of_step
        if self.passes and self.num_positions >= most:
            raise TooLarge(
                f"the trunk keeps the activations of a step, and this one of {client} has "
                f"{self.num_positions} positions already; a step of this run has at most {most} "
                "(train.batch_size x train.accumulation x data.sequence_length); send the step"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parameters:
    """A copy of the trained parameters of a version, after so many barriers have closed."""

    version: int
    barrier_version: int
    values: Mapping[str, Tensor]


class Replica:
    """Trains one set of parameters.

    `barrier` is the aggregator's state, `steps` the number of optimizer steps taken, `schedule` the
    clients' places in the learning rate schedule, and `guard` the norms of contributions.

    Args:
        versions: The parameters.
        run: The run's optimizer and policy.
        compute: The module that the parameters are installed in.
        update: Makes a step from contributions.
        on_clipped: Called with the client of a contribution that was accepted, and is clipped when
            its step is taken.
    """

    def __init__(
        self,
        versions: ParameterVersions,
        run: RunSpec,
        compute: Compute,
        update: TrunkUpdate,
        *,
        on_clipped: Callable[[str], None],
    ) -> None:
        self.versions = versions
        self._on_clipped = on_clipped
        self.barrier = aggregator.Barrier()
        self.steps = 0
        self.schedule = Schedule()
        # A median is halved in the time of a round.
        self.guard = NormGuard(
            run.guard,
            clients=1 if update.replicas else run.clients,
            memory=run.train.local_steps * run.clients,
        )
        self._run = run
        self._compute = compute
        self._update = update
        self._contributions: dict[str, Contribution] = {}
        self._due: aggregator.Step | None = None

    @property
    def positions_of_step(self) -> int:
        """The most sequences times tokens in a step of a client of the run."""
        train = self._run.train
        return train.batch_size * train.accumulation * self._run.data.sequence_length

    def begin(self) -> Work:
        """Return new work for a step of a session, on the current version."""
        return Work(
            replica=self, version=self.versions.current, barrier_version=self.barrier.version
        )

    def parameters(self) -> Parameters:
        """Return a copy of the current parameters, with the values at rank 0; all call this."""
        versions = self.versions
        return Parameters(
            version=versions.current, barrier_version=self.barrier.version, values=versions.whole()
        )

    def notify(self, event: aggregator.Event, now: float) -> aggregator.Decision:
        """Pass an event to the aggregator and return its decision; a step becomes due."""
        self.barrier, decision = aggregator.advance(
            self.barrier, event, now=now, policy=self._run.policy
        )
        if isinstance(decision, aggregator.Step):
            # The step is taken later, after the reply to the client that completed the barrier.
            self._due = decision
        return decision

    def contribute(
        self, client: str, work: Work, request: StepRequest, bounds: Bounds, now: float
    ) -> StepReply:
        """Add the clipped gradients of a session to the barrier, and end its work.

        Raises:
            StaleVersion: They are too old, or the client's second ones for this barrier.
            NonFinite: Their norm is NaN or Inf.
            GradExploded: Their norm is far larger than that of the contributions before them.
        """
        work.end()
        trunk_sq_norm = work.sq_norm
        # Unscaled before they are clipped and summed: each client has a loss scale of its own.
        if request.loss_scale != 1.0:
            unscale(work.gradients.values(), request.loss_scale)
            trunk_sq_norm = self.versions.layout.squared_norm(work.gradients)
        sq_norm = total_sq_norm(trunk_sq_norm, request.client_sq_norm, self._run.train)
        require_finite(torch.tensor(sq_norm, dtype=torch.float64), "the squared gradient norm")
        # As the run's clipping leaves it: one batch in many has a far larger gradient before.
        norm = math.sqrt(trunk_sq_norm) * clip_coefficient(sq_norm, self._run.train.clip_norm)
        require_in_proportion(client, norm, bounds)
        work.is_clipped = clip(
            work.gradients.values(), sq_norm, trunk_sq_norm, bounds.clip, self._run.train
        )
        work.staleness = self.barrier.version - work.barrier_version
        decision = self.notify(
            aggregator.Contributed(
                client=client, version=work.barrier_version, num_tokens=request.num_tokens
            ),
            now,
        )
        if isinstance(decision, aggregator.Refuse):
            raise StaleVersion(
                f"step {request.step} of {client} was made with version {work.barrier_version}, "
                f"but the trunk is at {decision.current}; repeat the step"
            )
        place = self.schedule.place_of(client, request.step)
        self.schedule.accepted(client, place)
        self._contributions[client] = Contribution(
            client=client,
            gradients=work.gradients,
            sq_norm=sq_norm,
            client_sq_norm=request.client_sq_norm,
            norm=min(norm, bounds.clip),
            most=bounds.clip,
            loss_scale=request.loss_scale,
            step=place,
            num_tokens=request.num_tokens,
            passes=work.passes,
        )
        return StepReply(version=self.versions.current + 1)

    def step_if_due(self, lr_scale: float) -> StepTaken | None:
        """Step if a step is due, with this factor on the learning rate; return the step."""
        if self._due is None:
            return None
        due, self._due = self._due, None
        contributions = self._bounded([self._contributions.pop(each) for each in due.weights])
        # `due.weights` is sorted by client, and so are the contributions. Their norms are added
        # here, so that the bounds of a barrier do not depend on the order of arrival.
        for each in contributions:
            self.schedule.taken(each.step)
            self.guard.add(each.client, each.norm)
        step = TrunkStep(
            contributions,
            due.weights,
            scale=due.scale * lr_scale,
            update=self._update,
            versions=self.versions,
            compute=self._compute,
        )
        step.take(contributions)
        self._update.after_step(step)
        self.steps += step.taken
        return StepTaken(
            version=self.versions.current,
            clients=tuple(due.weights),
            num_tokens=sum(each.num_tokens for each in contributions),
            taken=step.taken,
            lr=self._run.train.lr_at(step.position) * due.scale * lr_scale,
            gradient_norm=sum(
                due.weights[each.client] * each.sq_norm**0.5 for each in contributions
            ),
        )

    def _bounded(self, contributions: Sequence[Contribution]) -> Sequence[Contribution]:
        """Return the contributions of a step; of the first steps, those that stand out clipped."""
        bounds = self.guard.first_bounds([each.norm for each in contributions])
        found = []
        for each in contributions:
            if each.norm > bounds.refuse:
                self._on_clipped(each.client)
                each = each.clipped(min(bounds.clip, bounds.refuse))
            found.append(each)
        return found

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the state of training, by name; no client may be at work."""
        counts = {
            "barrier": self.barrier.version,
            "steps": self.steps,
            "position": self.schedule.position,
        }
        guard = {_GUARD + name: value for name, value in self.guard.state().items()}
        return {
            **self.versions.state(),
            **{name: torch.tensor(count) for name, count in counts.items()},
            **{name: torch.tensor(value, dtype=torch.float64) for name, value in guard.items()},
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state that `state` returned.

        Raises:
            CheckpointError: The state is not that of these parameters.
        """
        self.versions.load_state(state)
        self.barrier = replace(self.barrier, version=int(state["barrier"]))
        self.steps, self.schedule = int(state["steps"]), Schedule(int(state["position"]))
        guard = {k: v.item() for k, v in state.items() if k.startswith(_GUARD)}
        self.guard.load_state({k.removeprefix(_GUARD): v for k, v in guard.items()})
