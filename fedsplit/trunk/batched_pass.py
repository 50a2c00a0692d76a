"""One training pass of the trunk for several clients, and what each of their gradients is alone.

Shapes: B sequences of all clients, T tokens, D hidden width. Rows of a batch do not see one
another, so forward and backward of all go through the blocks at once. Only a parameter's gradient
would be the sum over everybody; each client's own is had from what the parameter's module was
given and what came back to it, row by row, as per-example gradients are in differential privacy
(Rochette, Manoel and Tramel 2019, arXiv 1912.06015).
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
from fedsplit.trunk.compute import Compute, Inputs
from fedsplit.trunk.versions import ParameterVersions

log = logging.getLogger(__name__)

Found = tuple[Mapping[str, Tensor | None], Tensor | None]
"""Of one call's backward: its parameters' gradients by name, and its smashed data's."""

_TOLERANCE = 1e-4


class CannotShare(Exception):
    """A module with parameters of its own that is no function of one tensor, row by row."""


@dataclass(slots=True, eq=False)
class _Seen:
    """What a module was given in one call, and the gradient of what it made of that."""

    module: str
    input: Tensor
    grad_output: Tensor | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class BatchedForward:
    """A forward of several members; `rows` says how many sequences are whose.

    It is `broken` once a member's backward has run without the others': then none waits any more.
    """

    smashed_BTD: Tensor
    trunk_out_BTD: Tensor
    num_bytes: int
    rows: tuple[int, ...]
    seen: list[_Seen] = field(default_factory=list)
    broken: bool = False


class BatchedPass:
    """Forwards and backwards of several clients at once, where the trunk's family allows it.

    Whether it does is tried on two made-up clients when it is first needed.

    Args:
        trunk: The trunk part.
        compute: What runs it.
        trained: Names of the parameters that train.
    """

    def __init__(self, trunk: TrunkPart, compute: Compute, trained: Sequence[str]) -> None:
        self._trunk = trunk
        self._compute = compute
        self._owners: dict[str, list[str]] = {}
        for name in trained:
            self._owners.setdefault(name.rpartition(".")[0], []).append(name)
        self._can: bool | None = None

    def possible(self, versions: ParameterVersions) -> bool:
        """Whether members come out of one pass as they do alone."""
        if self._can is None:
            self._can = not self._compute.draws and self._try(versions)
            if not self._can:
                why = "it has dropout" if self._compute.draws else "its rows cannot be told apart"
                log.warning("clients of %s take turns: %s", self._trunk.family.__name__, why)
        return self._can

    def forward(
        self, members: Sequence[Inputs], versions: ParameterVersions, version: int
    ) -> BatchedForward:
        """The trunk's output for all members, whose masks and positions are of one shape."""
        inputs = Inputs(
            smashed_BTD=torch.cat([each.smashed_BTD.detach() for each in members]),
            attention_mask_BT=_cat([each.attention_mask_BT for each in members]),
            position_ids_BT=_cat([each.position_ids_BT for each in members]),
            dropout="",
        )
        seen: list[_Seen] = []
        with self._watched(seen):
            output = self._compute.forward(inputs, versions, version)
        return BatchedForward(
            smashed_BTD=inputs.smashed_BTD,
            trunk_out_BTD=output.trunk_out_BTD,
            num_bytes=output.num_bytes,
            rows=tuple(len(each.smashed_BTD) for each in members),
            seen=seen,
        )

    def backward(
        self,
        batched: BatchedForward,
        grads: Sequence[Tensor],
        versions: ParameterVersions,
        version: int,
    ) -> list[Found]:
        """What every member finds, in their order."""
        wanted, out_BTD = [batched.smashed_BTD], batched.trunk_out_BTD
        (grad_smashed_BTD,) = self._compute.backward(
            out_BTD, wanted, torch.cat(list(grads)), versions, version
        )
        assert grad_smashed_BTD is not None, "the output depends on the smashed data"
        with versions.installed(version):
            own = self._own_gradients(batched)
        return list(zip(own, grad_smashed_BTD.split(batched.rows), strict=True))

    @contextmanager
    def _watched(self, seen: list[_Seen]) -> Iterator[None]:
        """Note what goes in and out of every module with a trained parameter of its own."""

        def watch(name: str) -> Any:
            def see(module: nn.Module, given: tuple[Any, ...], kw: Any, output: Any) -> None:
                is_simple = len(given) == 1 and not kw and isinstance(given[0], Tensor)
                if not is_simple or not isinstance(output, Tensor):
                    raise CannotShare(f"{name} of type {type(module).__name__}")
                call = _Seen(module=name, input=given[0].detach())
                seen.append(call)
                output.register_hook(lambda grad: setattr(call, "grad_output", grad))

            return see

        handles = [
            self._trunk.get_submodule(name).register_forward_hook(watch(name), with_kwargs=True)
            for name in self._owners
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _own_gradients(self, batched: BatchedForward) -> list[dict[str, Tensor]]:
        own: list[dict[str, Tensor]] = [{} for _ in batched.rows]
        for call in batched.seen:
            if call.grad_output is None:  # nothing came back through it
                continue
            module, names = self._trunk.get_submodule(call.module), self._owners[call.module]
            inputs, grads = (_parted(t, batched.rows) for t in (call.input, call.grad_output))
            for total, given, grad in zip(own, inputs, grads, strict=True):
                with self._compute.autocast():
                    found = _gradients(module, names, given, grad)
                for name, gradient in found.items():
                    total[name] = total[name] + gradient if name in total else gradient
        return own

    def _try(self, versions: ParameterVersions) -> bool:
        version = versions.current
        members = [self._made_up(rows, seed) for seed, rows in enumerate((1, 2))]
        try:
            batched = self.forward(members, versions, version)
            grads = [torch.ones_like(each.smashed_BTD) for each in members]
            together = self.backward(batched, grads, versions, version)
            alone = [self._alone(*each, versions) for each in zip(members, grads, strict=True)]
        except (CannotShare, *FAMILY_ERRORS) as exc:
            log.info("a batched pass failed: %s", exc)
            return False
        outs = batched.trunk_out_BTD.split(batched.rows)
        return all(
            _close(mine_BTD, theirs_BTD) and _same(mine, theirs)
            for mine_BTD, mine, (theirs_BTD, theirs) in zip(outs, together, alone, strict=True)
        )

    def _alone(
        self, inputs: Inputs, grad_BTD: Tensor, versions: ParameterVersions
    ) -> tuple[Tensor, Found]:
        version, leaves = versions.current, versions.leaves(versions.current)
        out_BTD = self._compute.forward(inputs, versions, version).trunk_out_BTD
        *own, grad_smashed_BTD = self._compute.backward(
            out_BTD, [*leaves.values(), inputs.smashed_BTD], grad_BTD, versions, version
        )
        return out_BTD, (dict(zip(leaves, own, strict=True)), grad_smashed_BTD)

    def _made_up(self, rows: int, seed: int) -> Inputs:
        like = next(self._trunk.parameters())
        chance = torch.Generator().manual_seed(seed)
        smashed_BTD = torch.randn(rows, 5, self._trunk.config.hidden_size, generator=chance)
        return Inputs(
            smashed_BTD=smashed_BTD.to(like),
            attention_mask_BT=None,
            position_ids_BT=None,
            dropout="",
        )


def _gradients(
    module: nn.Module, names: Sequence[str], given: Tensor, grad_output: Tensor
) -> dict[str, Tensor]:
    """Of a module's trained parameters, from one member's rows."""
    parameters = {name: module.get_parameter(name.rpartition(".")[2]) for name in names}
    is_plain = len({given.dtype, grad_output.dtype, *(p.dtype for p in parameters.values())}) == 1
    if is_plain and (rule := _RULES.get(type(module))):
        x_ND, g_NE = given.flatten(0, -2), grad_output.flatten(0, -2)
        return {name: rule(name.rpartition(".")[2], x_ND, g_NE) for name in names}
    with torch.enable_grad():
        output = module(given)
    found = torch.autograd.grad(output, list(parameters.values()), grad_output.to(output.dtype))
    return dict(zip(parameters, found, strict=True))


def _of_linear(parameter: str, x_ND: Tensor, g_NE: Tensor) -> Tensor:
    return g_NE.sum(0) if parameter == "bias" else g_NE.t().mm(x_ND)


def _of_conv1d(parameter: str, x_ND: Tensor, g_NE: Tensor) -> Tensor:
    return g_NE.sum(0) if parameter == "bias" else x_ND.t().mm(g_NE)


_RULES = {nn.Linear: _of_linear, Conv1D: _of_conv1d}
"""Without running the module once more."""


def _parted(tensor: Tensor, rows: Sequence[int]) -> Sequence[Tensor]:
    """What is whose; some families put a sequence's tokens into the first dimension as well."""
    per_row = len(tensor) // sum(rows)
    parts: Sequence[Tensor] = tensor.split([per_row * each for each in rows])
    return parts


def _cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(there) if there else None


def _same(ours: Found, theirs: Found) -> bool:
    names = ours[0].keys() | theirs[0].keys()
    own = [(ours[0].get(name), theirs[0].get(name)) for name in names]
    return all(_close(mine, other) for mine, other in [(ours[1], theirs[1]), *own])


def _close(ours: Tensor | None, theirs: Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    tolerance = _TOLERANCE if theirs.dtype == torch.float32 else 300 * _TOLERANCE
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())
