"""One set of the trunk's parameters, and the barrier of those who train it.

What a session does between two steps is its `Work`; what it hands over at the second one waits
as a `Contribution` until the aggregator says with which weights to step.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedsplit.errors import StaleVersion
from fedsplit.optimization import clip_coefficient, squared_norm, unscale
from fedsplit.spec import RunSpec
from fedsplit.trunk import aggregator
from fedsplit.trunk.compute import Compute, Inputs
from fedsplit.trunk.guard import require_finite
from fedsplit.trunk.versions import ParameterVersions
from fedsplit.wire.messages import StepReply, StepRequest

Gradients = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replay:
    """A forward and its backward, to be done again on later parameters."""

    inputs: Inputs
    grad_trunk_out_BTD: Tensor


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
    replays: list[Replay] = field(default_factory=list)
    outdated: bool = False

    def __post_init__(self) -> None:
        self.replica.versions.pin(self.version)

    def add(self, found: Mapping[str, Tensor | None], num_positions: int) -> None:
        """Accumulate the gradients of a backward."""
        self.num_positions += num_positions
        _accumulate(self.gradients, found)
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Contribution:
    gradients: Gradients
    replays: list[Replay]
    step: int
    ends_sq_norm: float
    loss_scale: float


class Replica:
    """Parameters and their training.

    `barrier` is the aggregator's state, `steps` counts the optimizer steps taken, and `position`
    is where the learning rate schedule stands: the clients' own count of steps.

    With `train.trunk_steps` above one, each step is followed by further ones from stored
    activations: the same smashed data runs through the new parameters, and the gradient of the
    trunk's output that came for it runs back once more. So these steps go down the clients' loss
    linearized at the trunk's output; they take the weights, the learning rate and the clipping of
    the step that they follow. The idea, there without gradients that cross, is of Liang, Zhang,
    Chen, Li, Li and Yang 2025, "Towards Straggler-Resilient Split Federated Learning: An
    Unbalanced Update Approach", arXiv 2510.21155.

    Args:
        versions: The parameters.
        run: The run's optimizer and policy.
        compute: The module that they are installed in.
    """

    def __init__(self, versions: ParameterVersions, run: RunSpec, compute: Compute) -> None:
        self.versions = versions
        self.barrier = aggregator.Barrier()
        self.steps = 0
        self.position = 0
        self._run = run
        self._compute = compute
        self._contributions: dict[str, _Contribution] = {}
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
        sq_norm = self._sq_norm(trunk_sq_norm, request.ends_sq_norm)
        require_finite(torch.tensor(sq_norm, dtype=torch.float64), "the squared gradient norm")
        self._clip(work.gradients, sq_norm)
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
        self._contributions[client] = _Contribution(
            gradients=work.gradients,
            replays=work.replays,
            step=request.step,
            ends_sq_norm=request.ends_sq_norm,
            loss_scale=request.loss_scale,
        )
        return StepReply(version=self.versions.current + 1)

    def step_if_due(self) -> bool:
        """Step if the aggregator has decided to; whether it had."""
        if self._due is None:
            return False
        due, self._due = self._due, None
        given = {client: self._contributions.pop(client) for client in due.weights}
        place = max(each.step for each in given.values())
        self.position = max(self.position, place + 1)
        self._step({client: each.gradients for client, each in given.items()}, due, place)
        for _ in range(self._run.train.trunk_steps - 1):
            again = {client: self._replayed(each) for client, each in given.items()}
            sq_norms = [
                self._sq_norm(squared_norm(again[client].values()), each.ends_sq_norm)
                for client, each in given.items()
            ]
            if not all(map(math.isfinite, sq_norms)):
                break
            for gradients, sq_norm in zip(again.values(), sq_norms, strict=True):
                self._clip(gradients, sq_norm)
            self._step(again, due, place)
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

    def _step(self, gradients: Mapping[str, Gradients], due: aggregator.Step, place: int) -> None:
        # Clients in the order of their names, so that the sum does not depend on who was first.
        mean: Gradients = {}
        for client, weight in due.weights.items():
            for name, gradient in gradients[client].items():
                part = gradient if weight == 1.0 else gradient.mul_(weight)
                mean[name] = mean[name].add_(part) if name in mean else part
        self.versions.step(mean, place, due.scale)
        self.steps += 1

    def _replayed(self, contribution: _Contribution) -> Gradients:
        total: Gradients = {}
        versions, version = self.versions, self.versions.current
        leaves = versions.leaves(version)
        for replay in contribution.replays:
            out_BTD = self._compute.forward(replay.inputs, versions, version).trunk_out_BTD
            found = self._compute.backward(
                out_BTD, list(leaves.values()), replay.grad_trunk_out_BTD, versions, version
            )
            _accumulate(total, dict(zip(leaves, found, strict=True)))
        unscale(total.values(), contribution.loss_scale)
        return total

    def _sq_norm(self, trunk_sq_norm: float, ends_sq_norm: float) -> float:
        ends = ends_sq_norm if self._run.train.clip == "global" else 0.0
        return ends + trunk_sq_norm

    def _clip(self, gradients: Gradients, sq_norm: float) -> None:
        coefficient = clip_coefficient(sq_norm, self._run.train.clip_norm)
        if coefficient != 1.0:
            for gradient in gradients.values():
                gradient.mul_(coefficient)


def _accumulate(total: Gradients, found: Mapping[str, Tensor | None]) -> None:
    for name, gradient in found.items():
        if gradient is None:
            continue
        if name in total:
            total[name] += gradient
        else:
            total[name] = gradient
