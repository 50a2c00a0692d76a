"""Forward and backward of the trunk's module: on a parameter version, with a call's own dropout.

Shapes: B sequences, T tokens, D hidden width. Only the thread that owns the module may use it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.model.acceleration import apply_training_options, autocast, checkpoints
from fedsplit.model.memory import ByteCount
from fedsplit.model.stage import TrunkPart
from fedsplit.randomness import draws, rng_scope
from fedsplit.spec import RunSpec
from fedsplit.trunk.guard import require_finite
from fedsplit.trunk.versions import ParameterVersions
from fedsplit.wire.messages import ForwardRequest


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inputs:
    """What a forward is made of, on the trunk's device; `dropout` names its random numbers."""

    smashed_BTD: Tensor
    attention_mask_BT: Tensor | None
    position_ids_BT: Tensor | None
    dropout: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Output:
    """What came out of a forward, and the bytes of activations that it left behind."""

    trunk_out_BTD: Tensor
    num_bytes: int


class Compute:
    """The module at work.

    Args:
        trunk: The trunk part, on its device.
        run: In which precision it computes, what it recomputes, and whether it is compiled.

    `draws` says whether a training forward draws random numbers.

    Raises:
        ConfigError: The family cannot do what the run asks for.
    """

    def __init__(self, trunk: TrunkPart, run: RunSpec) -> None:
        apply_training_options(trunk, run.train)
        self.device = next(trunk.parameters()).device
        self._trunk = trunk
        self._precision = run.model
        self.draws = draws(trunk)
        # A backward that recomputes activations draws their dropout again.
        self._backward_draws = self.draws and checkpoints(trunk, run.train)

    def inputs(self, request: ForwardRequest, dropout: str) -> Inputs:
        """Take a request's tensors to the device.

        Raises:
            NonFinite: The smashed data holds NaN or Inf.
        """
        require_finite(request.smashed_BTD, "smashed_BTD")
        mask_BT, positions_BT = request.attention_mask_BT, request.position_ids_BT
        return Inputs(
            smashed_BTD=request.smashed_BTD.to(self.device),
            attention_mask_BT=None if mask_BT is None else mask_BT.to(self.device),
            position_ids_BT=None if positions_BT is None else positions_BT.to(self.device),
            dropout=dropout,
        )

    def evaluate(self, inputs: Inputs, versions: ParameterVersions) -> Tensor:
        """The trunk's output on the current version, without dropout and graph."""
        self._set_mode(False)
        with versions.installed(versions.current), torch.no_grad():
            return self._run(inputs)

    def forward(self, inputs: Inputs, versions: ParameterVersions, version: int) -> Output:
        """The trunk's output on a version, with a graph down to `inputs.smashed_BTD`."""
        self._set_mode(True)
        inputs.smashed_BTD.requires_grad_()
        with versions.installed(version):
            count = ByteCount(self._trunk.parameters())
            scope = rng_scope(inputs.dropout, needed=self.draws)
            with scope, torch.enable_grad(), count.counting():
                trunk_out_BTD = self._run(inputs)
        return Output(trunk_out_BTD=trunk_out_BTD, num_bytes=count.num_bytes)

    def backward(
        self,
        output_BTD: Tensor,
        wanted: Sequence[Tensor],
        grad_output_BTD: Tensor,
        versions: ParameterVersions,
        version: int,
    ) -> tuple[Tensor | None, ...]:
        """The gradients of `wanted`, one each; none where the output does not depend on it."""
        if not wanted:
            return ()
        self._set_mode(True)
        scope = rng_scope("recomputation", needed=self._backward_draws)
        with versions.installed(version), scope:
            return torch.autograd.grad(
                output_BTD, wanted, grad_output_BTD.to(self.device), allow_unused=True
            )

    def autocast(self) -> AbstractContextManager[None]:
        """A block in the precision that forwards compute in."""
        return autocast(self._precision, self.device)

    def _run(self, inputs: Inputs) -> Tensor:
        with self.autocast():
            out_BTD = self._trunk.run(
                inputs.smashed_BTD,
                attention_mask_BT=inputs.attention_mask_BT,
                position_ids_BT=inputs.position_ids_BT,
            )
        return out_BTD.to(inputs.smashed_BTD.dtype)  # some families end a block in the smaller one

    def _set_mode(self, training: bool) -> None:
        if self._trunk.training != training:
            self._trunk.train(training)
