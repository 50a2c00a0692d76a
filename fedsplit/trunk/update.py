"""The update: makes a step of the trunk from the clients' gradients; a method overrides it.

Shapes: B sequences, T tokens, D hidden width.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedsplit.errors import ConfigError
from fedsplit.optimization import clip_coefficient
from fedsplit.spec import RunSpec
from fedsplit.spec.train import TrainSpec
from fedsplit.trunk.combine import COMBINATIONS, Gradients
from fedsplit.trunk.compute import Compute, Inputs
from fedsplit.trunk.versions import ParameterVersions


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredPass:
    """A forward and its backward, kept so that later parameters can run them again."""

    inputs: Inputs
    grad_trunk_out_BTD: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contribution:
    """The gradients that one client contributes to a step, clipped.

    `sq_norm` is their squared norm before clipping; with `train.clip=global` it includes
    `client_sq_norm`, the squared norm of the gradients at the client. `norm` is the norm of the
    clipped gradients alone, and `most` the bound of the guard on it.
    `loss_scale` is the factor in the gradients of `passes`, which are kept if the update
    `keeps_passes`. `step` is the place of the step in the schedule, and `num_tokens` are the
    tokens of the client.
    """

    client: str
    gradients: Gradients
    sq_norm: float
    client_sq_norm: float
    norm: float
    most: float
    loss_scale: float
    step: int
    num_tokens: int
    passes: Sequence[StoredPass]

    def clipped(self, most: float) -> "Contribution":
        """Return this contribution with its gradients scaled, in place, to the norm `most`."""
        for gradient in self.gradients.values():
            gradient.mul_(most / self.norm)
        return replace(self, norm=most, most=most)


class TrunkUpdate:
    """The step of SplitFed V2: one optimizer step with the clients' gradients, combined.

    A method that steps in another way is a subclass; a strategy names it as its `update`. The
    engine's thread alone calls it, so it needs no lock.

    `keeps_passes` says whether contributions keep the activations that they were made with. With
    `replicas` every client trains a copy of the trunk by itself and waits for no other client;
    `TrunkService.average` averages the copies.

    Args:
        run: The run.

    Raises:
        ConfigError: `train.trunk_steps` asks for further steps, and the update takes none; or
            `policy.combine` is for three clients or more, and a step has fewer.
    """

    keeps_passes: ClassVar[bool] = False
    replicas: ClassVar[bool] = False

    def __init__(self, run: RunSpec) -> None:
        self.run = run
        if run.train.trunk_steps > 1 and not self.keeps_passes:
            raise ConfigError(
                f"train.trunk_steps={run.train.trunk_steps} asks for further steps of the trunk, "
                f"but {type(self).__name__} takes one step at a time; use strategy=mu_splitfed or "
                "trunk_steps=1"
            )
        if run.policy.combine != "mean" and run.clients < 3:
            raise ConfigError(
                f"policy.combine={run.policy.combine} leaves out what stands out among several "
                f"gradients, and clients={run.clients} have too few; use policy.combine=mean, or "
                "three clients or more"
            )
        if run.policy.combine != "mean" and self.replicas:
            raise ConfigError(
                f"policy.combine={run.policy.combine} combines the gradients of several clients, "
                f"but with {type(self).__name__} each client trains a trunk of its own; use "
                "policy.combine=mean"
            )

    def combine(
        self, contributions: Sequence[Contribution], weights: Mapping[str, float]
    ) -> Gradients:
        """Return the gradients of a step; the contributions' tensors may be changed in place.

        Args:
            contributions: One per client, sorted by client.
            weights: The policy's weight of each client; they sum to one.
        """
        combination = COMBINATIONS[self.run.policy.combine]
        return combination(
            [each.gradients for each in contributions],
            [weights[each.client] for each in contributions],
        )

    def after_step(self, step: "TrunkStep") -> None:
        """Run after each step of the trunk; it may take further steps."""


class TrunkStep:
    """A step of one set of parameters, which `TrunkUpdate.after_step` can continue.

    `taken` is the number of optimizer steps, and `position` the place of the first one in the
    learning rate schedule. Further steps use the weights, the position in the
    learning rate schedule and the clipping of the first one.

    Args:
        contributions: One per client, sorted by client.
        weights: The policy's weight of each client; they sum to one.
        scale: The factor on the learning rate.
        update: How gradients are combined.
        versions: The parameters.
        compute: Runs the module on them.
    """

    def __init__(
        self,
        contributions: Sequence[Contribution],
        weights: Mapping[str, float],
        *,
        scale: float,
        update: TrunkUpdate,
        versions: ParameterVersions,
        compute: Compute,
    ) -> None:
        self.contributions = contributions
        self.taken = 0
        self._weights = weights
        self.position = max(each.step for each in contributions)
        self._scale = scale
        self._update = update
        self._versions = versions
        self._compute = compute

    def take(self, contributions: Sequence[Contribution]) -> None:
        """Combine contributions and take an optimizer step with the result."""
        gradients = self._update.combine(contributions, self._weights)
        self._versions.step(gradients, self.position, self._scale)
        self.taken += 1

    def run_again(self, stored: StoredPass) -> dict[str, Tensor | None]:
        """Run a forward and its backward on the current parameters, with the same dropout."""
        versions, version = self._versions, self._versions.current
        leaves = versions.leaves(version)
        out_BTD = self._compute.forward(stored.inputs, versions, version).trunk_out_BTD
        gradients = self._compute.backward(
            out_BTD, list(leaves.values()), stored.grad_trunk_out_BTD, versions, version
        )
        return dict(zip(leaves, gradients, strict=True))

    def contribution_with(self, contribution: Contribution, gradients: Gradients) -> Contribution:
        """Return a client's contribution with other gradients, clipped as the first ones were."""
        train = self._update.run.train
        trunk_sq_norm = self._versions.layout.squared_norm(gradients)
        sq_norm = total_sq_norm(trunk_sq_norm, contribution.client_sq_norm, train)
        clip(gradients.values(), sq_norm, trunk_sq_norm, contribution.most, train)
        return replace(contribution, gradients=gradients, sq_norm=sq_norm)


def accumulate(total: Gradients, gradients: Mapping[str, Tensor | None]) -> None:
    """Add gradients to a sum, in place."""
    for name, gradient in gradients.items():
        if gradient is None:
            continue
        if name in total:
            total[name] += gradient
        else:
            total[name] = gradient


def total_sq_norm(trunk_sq_norm: float, client_sq_norm: float, train: TrainSpec) -> float:
    """Return the squared norm that clipping compares: of all parts, or of the trunk alone."""
    return trunk_sq_norm + (client_sq_norm if train.clip == "global" else 0.0)


def clip(
    gradients: Iterable[Tensor], sq_norm: float, trunk_sq_norm: float, most: float, train: TrainSpec
) -> bool:
    """Scale gradients in place, so that their norms are at most `train.clip_norm` and `most`.

    Args:
        gradients: The trunk's gradients.
        sq_norm: The squared norm that `train.clip_norm` bounds, from `total_sq_norm`.
        trunk_sq_norm: The squared norm of the trunk's gradients alone, which `most` bounds.
        most: The bound of the guard; may be infinite.
        train: The settings of the run.

    Returns:
        Whether `most` is the lower bound of the two, so that the guard has changed the gradients.
    """
    coefficient, is_guarded = clip_coefficient(sq_norm, train.clip_norm), False
    if trunk_sq_norm > most**2:
        guarded = most / math.sqrt(trunk_sq_norm)
        coefficient, is_guarded = min(coefficient, guarded), guarded < coefficient
    if coefficient != 1.0:
        for gradient in gradients:
            gradient.mul_(coefficient)
    return is_guarded
