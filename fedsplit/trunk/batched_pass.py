"""One training pass of the trunk for several clients, with the gradients of each client.

Shapes: B sequences of all clients, T tokens, D hidden width, N rows times tokens, E output width.
The rows of a batch are independent, so the forwards and the backwards of all clients run as one.
Only the gradient of a parameter would be the sum over all clients. The gradient of each client is
computed from the input and the output gradient of the parameter's module, row by row, like
per-sample gradients in differential privacy (Rochette, Manoel and Tramel 2019, arXiv 1912.06015).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedsplit.model.dryrun import FAMILY_ERRORS
from fedsplit.model.stage import TrunkPart
from fedsplit.model.tensor_parallel import num_ranks
from fedsplit.trunk.compute import Compute, Inputs
from fedsplit.trunk.versions import ParameterVersions

log = logging.getLogger(__name__)

BackwardResult = tuple[Mapping[str, Tensor | None], Tensor | None]
"""The result of a backward: gradients of parameters by name, and that of the smashed data."""

# The trial allows rounding: a batch and its rows are summed in different orders.
_TOLERANCE = 1e-4


class CannotShare(Exception):
    """A module with parameters of its own is not a function of one tensor, row by row."""


@dataclass(slots=True, eq=False)
class _ModuleCall:
    """The input of one call of a module, and the gradient of its output."""

    module: str
    input: Tensor
    grad_output: Tensor | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class BatchedForward:
    """A forward of several members; `rows` is the number of sequences of each.

    It is `broken` as soon as the backward of one member has run without the others. After that, no
    member waits for the others.
    """

    smashed_BTD: Tensor
    trunk_out_BTD: Tensor
    num_bytes: int
    rows: tuple[int, ...]
    autocast: str
    module_calls: list[_ModuleCall] = field(default_factory=list)
    broken: bool = False


class BatchedPass:
    """Runs forwards and backwards of several clients as one, if the trunk's family allows it.

    A trial with two random clients decides it, at the first use.

    Args:
        trunk: The trunk part.
        compute: Runs the trunk.
        trained: Names of the parameters that train.
    """

    def __init__(self, trunk: TrunkPart, compute: Compute, trained: Sequence[str]) -> None:
        self._trunk = trunk
        self._compute = compute
        self._owners: dict[str, list[str]] = {}
        for name in trained:
            self._owners.setdefault(name.rpartition(".")[0], []).append(name)
        self._is_possible: bool | None = None

    def possible(self, versions: ParameterVersions) -> bool:
        """Return whether members have the same results in one pass as alone."""
        if self._is_possible is None:
            # With dropout, each call draws from its own seed, which one pass cannot do.
            why = "its rows cannot be separated"
            if self._compute.draws:
                why = "it has dropout"
            elif num_ranks(self._trunk) > 1:
                why = "it is cut over several ranks"
            else:
                self._is_possible = self._passes_trial(versions)
            if not self._is_possible:
                self._is_possible = False
                log.warning("clients of %s take turns: %s", self._trunk.family.__name__, why)
        return self._is_possible

    def forward(
        self, members: Sequence[Inputs], versions: ParameterVersions, version: int
    ) -> BatchedForward:
        """Run the forwards of all members, which agree in mode, precision and shapes."""
        inputs = Inputs(
            smashed_BTD=torch.cat([each.smashed_BTD.detach() for each in members]),
            attention_mask_BT=_cat([each.attention_mask_BT for each in members]),
            position_ids_BT=_cat([each.position_ids_BT for each in members]),
            dropout="",
            train_mode=members[0].train_mode,
            autocast=members[0].autocast,
        )
        module_calls: list[_ModuleCall] = []
        with self._recording(module_calls):
            output = self._compute.forward(inputs, versions, version)
        return BatchedForward(
            smashed_BTD=inputs.smashed_BTD,
            trunk_out_BTD=output.trunk_out_BTD,
            num_bytes=output.num_bytes,
            rows=tuple(len(each.smashed_BTD) for each in members),
            autocast=inputs.autocast,
            module_calls=module_calls,
        )

    def backward(
        self,
        batched: BatchedForward,
        grads: Sequence[Tensor],
        versions: ParameterVersions,
        version: int,
    ) -> list[BackwardResult]:
        """Return the result of each member's backward, in the order of the members."""
        # Parameters are not wanted here: autograd would compute their sums over all members.
        wanted, out_BTD = [batched.smashed_BTD], batched.trunk_out_BTD
        (grad_smashed_BTD,) = self._compute.backward(
            out_BTD, wanted, torch.cat(list(grads)), versions, version
        )
        assert grad_smashed_BTD is not None, "the output depends on the smashed data"
        # Some modules run again below, and must have the parameters of the forward.
        with versions.installed(version):
            own = self._own_gradients(batched)
        return list(zip(own, grad_smashed_BTD.split(batched.rows), strict=True))

    @contextmanager
    def _recording(self, module_calls: list[_ModuleCall]) -> Iterator[None]:
        """Record the input and the output gradient of every module with trained parameters."""

        def recorder(name: str) -> Any:
            def record(module: nn.Module, args: tuple[Any, ...], kw: Any, output: Any) -> None:
                is_simple = len(args) == 1 and not kw and isinstance(args[0], Tensor)
                if not is_simple or not isinstance(output, Tensor):
                    raise CannotShare(f"{name} of type {type(module).__name__}")
                call = _ModuleCall(module=name, input=args[0].detach())
                module_calls.append(call)
                output.register_hook(lambda grad: setattr(call, "grad_output", grad))

            return record

        handles = [
            self._trunk.get_submodule(name).register_forward_hook(recorder(name), with_kwargs=True)
            for name in self._owners
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _own_gradients(self, batched: BatchedForward) -> list[dict[str, Tensor]]:
        own: list[dict[str, Tensor]] = [{} for _ in batched.rows]
        for call in batched.module_calls:
            if call.grad_output is None:  # the output does not depend on this call
                continue
            module, names = self._trunk.get_submodule(call.module), self._owners[call.module]
            inputs, grads = (_split_rows(t, batched.rows) for t in (call.input, call.grad_output))
            for total, input_, grad in zip(own, inputs, grads, strict=True):
                with self._compute.autocast(batched.autocast):
                    gradients = _gradients(module, names, input_, grad)
                # Summed over calls: a module may run several times in one forward.
                for name, gradient in gradients.items():
                    total[name] = total[name] + gradient if name in total else gradient
        return own

    def _passes_trial(self, versions: ParameterVersions) -> bool:
        version = versions.current
        members = [self._random_inputs(rows, seed) for seed, rows in enumerate((1, 2))]
        try:
            batched = self.forward(members, versions, version)
            grads = [torch.ones_like(each.smashed_BTD) for each in members]
            together = self.backward(batched, grads, versions, version)
            alone = [self._alone(*each, versions) for each in zip(members, grads, strict=True)]
        except (CannotShare, *FAMILY_ERRORS) as exc:
            log.info("the trial of a batched pass failed: %s", exc)
            return False
        outs = batched.trunk_out_BTD.split(batched.rows)
        return all(
            _close(mine_BTD, theirs_BTD) and _same(mine, theirs)
            for mine_BTD, mine, (theirs_BTD, theirs) in zip(outs, together, alone, strict=True)
        )

    def _alone(
        self, inputs: Inputs, grad_BTD: Tensor, versions: ParameterVersions
    ) -> tuple[Tensor, BackwardResult]:
        version, leaves = versions.current, versions.leaves(versions.current)
        out_BTD = self._compute.forward(inputs, versions, version).trunk_out_BTD
        *own, grad_smashed_BTD = self._compute.backward(
            out_BTD, [*leaves.values(), inputs.smashed_BTD], grad_BTD, versions, version
        )
        return out_BTD, (dict(zip(leaves, own, strict=True)), grad_smashed_BTD)

    def _random_inputs(self, rows: int, seed: int) -> Inputs:
        # A generator of its own, so that the trial does not change the process's random numbers.
        generator = torch.Generator().manual_seed(seed)
        smashed_BTD = torch.randn(rows, 5, self._trunk.config.hidden_size, generator=generator)
        return Inputs(
            smashed_BTD=smashed_BTD.to(self._compute.device, self._trunk.dtype),
            attention_mask_BT=None,
            position_ids_BT=None,
            dropout="",
        )


def _gradients(
    module: nn.Module, names: Sequence[str], input_: Tensor, grad_output: Tensor
) -> dict[str, Tensor]:
    """Return the gradients of a module's trained parameters from the rows of one member."""
    parameters = {name: module.get_parameter(name.rpartition(".")[2]) for name in names}
    # With several dtypes (autocast), the module itself decides in which one it computes.
    dtypes = {input_.dtype, grad_output.dtype, *(p.dtype for p in parameters.values())}
    if len(dtypes) == 1 and (rule := _RULES.get(type(module))):
        x_ND, g_NE = input_.flatten(0, -2), grad_output.flatten(0, -2)
        return {name: rule(name.rpartition(".")[2], x_ND, g_NE) for name in names}
    with torch.enable_grad():
        output = module(input_)
    gradients = torch.autograd.grad(output, list(parameters.values()), grad_output.to(output.dtype))
    return dict(zip(parameters, gradients, strict=True))


def _of_linear(parameter: str, x_ND: Tensor, g_NE: Tensor) -> Tensor:
    return g_NE.sum(0) if parameter == "bias" else g_NE.t().mm(x_ND)


def _of_conv1d(parameter: str, x_ND: Tensor, g_NE: Tensor) -> Tensor:
    return g_NE.sum(0) if parameter == "bias" else x_ND.t().mm(g_NE)


_RULES = {nn.Linear: _of_linear, Conv1D: _of_conv1d}
"""Formulas of gradients, for modules that need not run a second time."""


def _split_rows(tensor: Tensor, rows: Sequence[int]) -> Sequence[Tensor]:
    """Split a tensor by the members' rows."""
    # Some families merge rows and tokens into the first dimension.
    per_row = len(tensor) // sum(rows)
    parts: Sequence[Tensor] = tensor.split([per_row * each for each in rows])
    return parts


def _cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None


def _same(ours: BackwardResult, theirs: BackwardResult) -> bool:
    names = ours[0].keys() | theirs[0].keys()
    own = [(ours[0].get(name), theirs[0].get(name)) for name in names]
    return all(_close(mine, other) for mine, other in [(ours[1], theirs[1]), *own])


def _close(ours: Tensor | None, theirs: Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    tolerance = _TOLERANCE if theirs.dtype == torch.float32 else 300 * _TOLERANCE
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())
