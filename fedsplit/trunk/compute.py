"""Forward and backward of the trunk's module, on a parameter version and with a call's dropout.

Shapes: B sequences, T tokens, D hidden width. Only the thread that owns the module may use it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.errors import ConfigError
from fedsplit.model.acceleration import (
    apply_training_options,
    autocast_to,
    checkpoints,
    precision_of,
)
from fedsplit.model.memory import ByteCount
from fedsplit.model.rope import by_length, tables_of
from fedsplit.model.stage import TrunkPart
from fedsplit.model.tensor_parallel import local_gradient, require_even
from fedsplit.randomness import draws, rng_scope
from fedsplit.spec import RunSpec
from fedsplit.trunk.guard import require_finite
from fedsplit.trunk.versions import ParameterVersions
from fedsplit.wire.messages import ForwardRequest


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inputs:
    """The tensors of a forward, on the trunk's device.

    `dropout` is the seed of its dropout, which it has in `train_mode`, `tables` a key of the rotary
    tables for its own positions, and `autocast` the precision that the client asks for.
    """

    smashed_BTD: Tensor
    attention_mask_BT: Tensor | None
    position_ids_BT: Tensor | None
    dropout: str
    train_mode: bool = True
    tables: tuple[int, ...] = ()
    autocast: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Output:
    """The output of a forward, and the bytes of activations kept for its backward."""

    trunk_out_BTD: Tensor
    num_bytes: int


class Compute:
    """Runs the trunk's module.

    `draws` says whether a training forward draws random numbers, that is, has dropout.

    Args:
        trunk: The trunk part, on its device.
        run: The run; its precision, recomputation and compilation are applied to the trunk.

    Raises:
        ConfigError: The family does not support an option of the run, the trunk has no values, or
            it has dropout and ranks have shards of different sizes.
    """

    def __init__(self, trunk: TrunkPart, run: RunSpec) -> None:
        apply_training_options(trunk, run.train)
        self.device = next(trunk.parameters()).device
        if self.device.type == "meta":
            raise ConfigError(
                "the trunk is on the meta device, so its parameters have no values to compute "
                "with; load the part, or call to_empty and set its parameters, before it is served"
            )
        self._trunk = trunk
        self._autocast = precision_of(run.model, self.device)
        self._seed = run.seed
        self._has_tables = by_length(trunk.config)
        self.draws = draws(trunk)
        if self.draws:
            require_even(trunk)
        # A backward that recomputes activations draws their dropout again.
        self._backward_draws = self.draws and checkpoints(trunk, run.train)

    def inputs(self, request: ForwardRequest, client: str, round: int) -> Inputs:
        """Return a request's tensors on the device.

        The seed of the dropout is that of the client's call in the round. A request that repeats a
        forward has the seed of that forward.

        Raises:
            NonFinite: The smashed data holds NaN or Inf.
        """
        # NaN from one client must not reach parameters that all clients share.
        require_finite(request.smashed_BTD, "smashed_BTD")
        mask_BT, positions_BT = request.attention_mask_BT, request.position_ids_BT
        largest = -1 if positions_BT is None else int(positions_BT.max())
        return Inputs(
            smashed_BTD=request.smashed_BTD.to(self.device),
            attention_mask_BT=None if mask_BT is None else mask_BT.to(self.device),
            position_ids_BT=None if positions_BT is None else positions_BT.to(self.device),
            dropout=f"trunk/{self._seed}/{client}/{round}/{request.call - request.calls_ago}",
            train_mode=request.training != request.other_mode,
            tables=tables_of(self._trunk.config, largest) if self._has_tables else (),
            autocast=request.autocast,
        )

    def evaluate(self, inputs: Inputs, versions: ParameterVersions) -> Tensor:
        """Return the trunk's output on the current version, without a graph."""
        mode = self._in_mode(inputs.train_mode, inputs.dropout)
        with versions.installed(versions.current), mode, torch.no_grad():
            return self._run(inputs)

    def forward(self, inputs: Inputs, versions: ParameterVersions, version: int) -> Output:
        """Return the trunk's output on a version, with a graph down to `inputs.smashed_BTD`."""
        inputs.smashed_BTD.requires_grad_()
        with versions.installed(version):
            count = ByteCount(self._trunk.parameters())
            mode = self._in_mode(inputs.train_mode, inputs.dropout)
            with mode, torch.enable_grad(), count.counting():
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
        """Return the gradient of each tensor in `wanted`; None if the output does not depend on it.

        The gradient of a parameter that is cut over ranks is that of this rank's shard.

        Args:
            output_BTD: The output of a forward.
            wanted: Tensors of the graph of the output.
            grad_output_BTD: The gradient of the output, on any device.
            versions: The parameters.
            version: The version of the forward.
        """
        if not wanted:
            return ()
        self._set_mode(True)
        scope = rng_scope("recomputation", needed=self._backward_draws)
        # A recomputed block reads the module's parameters, which must be those of the forward.
        with versions.installed(version), scope:
            gradients = torch.autograd.grad(
                output_BTD, wanted, grad_output_BTD.to(self.device), allow_unused=True
            )
        return tuple(map(local_gradient, wanted, gradients))

    def autocast(self, asked: str) -> AbstractContextManager[None]:
        """Return a context in which operations have the precision of a forward.

        That is the run's, or else the one that the client asked for.
        """
        precision = self._autocast or asked
        return autocast_to(precision, self.device) if precision else nullcontext()

    def _run(self, inputs: Inputs) -> Tensor:
        with self.autocast(inputs.autocast):
            out_BTD: Tensor = self._trunk(
                inputs.smashed_BTD, inputs.attention_mask_BT, inputs.position_ids_BT
            )
        # Under autocast some families return the lower precision; the wire has the weights' dtype.
        return out_BTD.to(inputs.smashed_BTD.dtype)

    def _in_mode(self, train_mode: bool, dropout: str) -> AbstractContextManager[None]:
        """Set the module's mode for a forward; return a context with the forward's dropout."""
        self._set_mode(train_mode)
        # Seeded per call, so that a repeated forward draws the same dropout.
        return rng_scope(dropout) if self.draws and train_mode else nullcontext()

    def _set_mode(self, training: bool) -> None:
        # `train` visits every module, so it is called only if the mode changes.
        if self._trunk.training != training:
            self._trunk.train(training)
