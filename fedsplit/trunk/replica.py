"""One set of the trunk's parameters, and the barrier of those who train it.

What a session accumulates between two steps is its `Work`. A step request turns it into a
`Contribution`, which waits until the aggregator decides with which weights to step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedsplit.errors import StaleVersion
from fedsplit.optimization import squared_norm, unscale
from fedsplit.spec import RunSpec
from fedsplit.trunk import aggregator
from fedsplit.trunk.compute import Compute
from fedsplit.trunk.guard import require_finite
from fedsplit.trunk.update import (
    Contribution,
    Gradients,
    StoredPass,
    TrunkStep,
    TrunkUpdate,
    accumulate,
    clip,
    total_sq_norm,
)
from fedsplit.trunk.versions import ParameterVersions
from fedsplit.wire.messages import StepReply, StepRequest


@dataclass(slots=True, kw_only=True, eq=False)
class Work:
    """What one session has done since its last step, all of it on one version.

    `barrier_version` counts the barriers that had closed when it began, `num_positions` the
    sequences times tokens of its backwards, and `sq_norm` is the squared norm of its `gradients`.
    Work that is `outdated` has lost its version and cannot go on.
    """

    replica: "Replica"
    version: int
    barrier_version: int
    gradients: Gradients = field(default_factory=dict)
    num_positions: int = 0
    sq_norm: float = 0.0
    passes: list[StoredPass] = field(default_factory=list)
    outdated: bool = False

    def __post_init__(self) -> None:
        self.replica.versions.pin(self.version)

    def add(self, found: Mapping[str, Tensor | None], num_positions: int) -> None:
        """Accumulate the gradients of a backward."""
        self.num_positions += num_positions
        accumulate(self.gradients, found)
        self.sq_norm = squared_norm(self.gradients.values())

    def end(self) -> None:
        """Let its version go."""
        if not self.outdated:
            self.replica.versions.unpin(self.version)

    def outdate(self) -> None:
        """Let its version go, and have it fail if it goes on."""
        self.end()
        self.outdated = True
        self.gradients.clear()

    def require_current(self, client: str) -> None:
        """Refuse to go on with outdated work.

        Raises:
            StaleVersion: It is.
        """
        if self.outdated:
            raise StaleVersion(
                f"{client} began this step with version {self.barrier_version}, but the trunk is "
                f"at {self.replica.barrier.version}; repeat the step"
            )


class Replica:
    """Parameters and their training.

    `barrier` is the aggregator's state, `steps` counts the optimizer steps taken, and `position`
    is where the learning rate schedule stands: the clients' own count of steps.

    Args:
        versions: The parameters.
        run: The run's optimizer and policy.
        compute: The module that they are installed in.
        update: How a step is made from contributions.
    """

    def __init__(
        self, versions: ParameterVersions, run: RunSpec, compute: Compute, update: TrunkUpdate
    ) -> None:
        self.versions = versions
        self.barrier = aggregator.Barrier()
        self.steps = 0
        self.position = 0
        self._run = run
        self._compute = compute
        self._update = update
        self._contributions: dict[str, Contribution] = {}
        self._due: aggregator.Step | None = None

    def begin(self) -> Work:
        """Begin a step of a session, on the current version."""
        return Work(
            replica=self, version=self.versions.current, barrier_version=self.barrier.version
        )

    def notify(self, event: aggregator.Event, now: float) -> aggregator.Decision:
        """Pass an event to the aggregator; a step that it decides on becomes due."""
        self.barrier, decision = aggregator.advance(
            self.barrier, event, now=now, policy=self._run.policy
        )
        if isinstance(decision, aggregator.Step):
            self._due = decision
        return decision

    def contribute(self, client: str, work: Work, request: StepRequest, now: float) -> StepReply:
        """Take over what a session accumulated, clipped; it ends the work.

        Raises:
            StaleVersion: It is too old, or the client's second to this barrier.
            NonFinite: Its norm is NaN or Inf.
        """
        work.end()
        trunk_sq_norm = work.sq_norm
        if request.loss_scale != 1.0:
            unscale(work.gradients.values(), request.loss_scale)
            trunk_sq_norm = squared_norm(work.gradients.values())
        sq_norm = total_sq_norm(trunk_sq_norm, request.client_sq_norm, self._run.train)
        require_finite(torch.tensor(sq_norm, dtype=torch.float64), "the squared gradient norm")
        clip(work.gradients.values(), sq_norm, self._run.train)
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
        self._contributions[client] = Contribution(
            client=client,
            gradients=work.gradients,
            sq_norm=sq_norm,
            client_sq_norm=request.client_sq_norm,
            loss_scale=request.loss_scale,
            step=request.step,
            passes=work.passes,
        )
        return StepReply(version=self.versions.current + 1)

    def step_if_due(self) -> bool:
        """Step if the aggregator has decided to; whether it had."""
        if self._due is None:
            return False
        due, self._due = self._due, None
        contributions = [self._contributions.pop(client) for client in due.weights]
        self.position = max(self.position, *(each.step + 1 for each in contributions))
        step = TrunkStep(
            contributions,
            due.weights,
            scale=due.scale,
            update=self._update,
            versions=self.versions,
            compute=self._compute,
        )
        step.take(contributions)
        self._update.after_step(step)
        self.steps += step.taken
        return True

    def state(self) -> dict[str, Tensor]:
        """A copy of all that training goes on from, by name, while nobody is at work."""
        counts = {"barrier": self.barrier.version, "steps": self.steps, "position": self.position}
        return self.versions.state() | {k: torch.tensor(v) for k, v in counts.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` handed out.

        Raises:
            CheckpointError: The state is not that of these parameters.
        """
        self.versions.load_state(state)
        self.barrier = replace(self.barrier, version=int(state["barrier"]))
        self.steps, self.position = int(state["steps"]), int(state["position"])
