"""The shards of a trunk's trained parameters: their norms, their leaves, and whole tensors."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fedsplit.model.tensor_parallel import SUMMED, num_ranks, shard_of, styles_of
from fedsplit.optimization import squared_norm

_DIFFERENT = 1e-3
"""Gradients of ranks that differ by more than this fraction are parts of a sum, and not rounded."""


def group_of(model: Any) -> Any:
    """Return the process group of the ranks that a model is cut over."""
    return model._device_mesh["tp"].get_group()


def _summed_by_plan(model: Any, plain: Collection[str]) -> set[str]:
    """Return the parameters of which the family's plan says that ranks must add their gradients."""
    styles = styles_of(model)
    owners = {name: name.rpartition(".")[0] for name in plain}
    return {k for k, owner in owners.items() if SUMMED in (styles.get(k), styles.get(owner))}


def _partial(model: Any, plain: Mapping[str, Tensor]) -> set[str]:
    """Return the uncut parameters whose gradients differ between ranks; all ranks call this.

    Ranks that compute with the same numbers have the same gradient of such a parameter. If it is
    used between cut ones, each rank has that of its own part, and plans do not name all of these.
    """
    if not plain:
        return set()
    shape = 2, 16, model.config.hidden_size
    hidden_BTD = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    hidden_BTD = hidden_BTD.to(model.device, model.dtype).requires_grad_()
    mode = model.training
    model.train(False)
    out_BTD = model.run(hidden_BTD)
    model.train(mode)
    grads = torch.autograd.grad(
        out_BTD, list(plain.values()), hidden_BTD.detach(), allow_unused=True
    )
    differ = []
    for parameter, found in zip(plain.values(), grads, strict=True):
        own = torch.zeros_like(parameter) if found is None else found.contiguous()
        first = own.clone()
        dist.broadcast(first, group=group_of(model), group_src=0)
        differ.append((own - first).abs().max() > _DIFFERENT * first.abs().max())
    # Of all ranks, since the first one differs from itself in nothing.
    counts = torch.stack(differ).to(torch.int64)
    dist.all_reduce(counts, group=group_of(model))
    return {name for name, count in zip(plain, counts.tolist(), strict=True) if count}


class ShardLayout:
    """Where the trained parameters of a model are cut; of a model in one process, nowhere.

    Args:
        model: The model.
        names: The names of its trained parameters.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        parameters = {name: model.get_parameter(name) for name in names}
        self._cut = {k: p for k, p in parameters.items() if isinstance(p, DTensor)}
        self._group: Any = None
        self._summed: set[str] = set()
        if num_ranks(model) > 1:
            self._group = group_of(model)
            plain = {name: p for name, p in parameters.items() if name not in self._cut}
            self._summed = _summed_by_plan(model, plain) | _partial(model, plain)

    def leaf(self, name: str, shard: Tensor) -> nn.Parameter:
        """Return a parameter of the model that has this shard, in the same memory."""
        if name in self._cut:
            like = self._cut[name]
            shape, stride = like.shape, like.stride()
            mesh, placements = like.device_mesh, like.placements
            return nn.Parameter(
                DTensor.from_local(
                    shard, mesh, placements, run_check=False, shape=shape, stride=stride
                )
            )
        leaf = nn.Parameter(shard)
        if name in self._summed:
            # transformers sums such gradients after `backward` only, not in `autograd.grad`.
            leaf.register_hook(self._sum)
        return leaf

    def squared_norm(self, gradients: Mapping[str, Tensor]) -> float:
        """Return the squared norm of whole gradients, from this rank's shards; on all ranks."""
        if self._group is None:
            return squared_norm(gradients.values())
        own = squared_norm(g for name, g in gradients.items() if self._is_cut(name))
        if dist.get_rank(self._group) == 0:
            # Once, and of one rank, so that all ranks decide by the same number.
            own += squared_norm(g for name, g in gradients.items() if not self._is_cut(name))
        device = next(iter(gradients.values())).device if gradients else "cpu"
        total = torch.tensor(own, dtype=torch.float64, device=device)
        dist.all_reduce(total, group=self._group)
        return total.item()

    def whole(self, name: str, shard: Tensor) -> Tensor:
        """Return a copy of the tensor of which each rank has a shard, cut as the parameter `name`.

        All ranks call this, and only rank 0 gets the values. The copy is on the CPU.
        """
        if name in self._cut and shard.ndim == self._cut[name].ndim:
            like = self._cut[name]
            shard = DTensor.from_local(
                shard,
                like.device_mesh,
                like.placements,
                run_check=False,
                shape=like.shape,
                stride=like.stride(),
            ).full_tensor()
            if dist.get_rank():
                shard = shard.new_empty(0)
        # `cpu` alone copies nothing on a CPU, and the next step would change the copy.
        return shard.to("cpu", copy=True)

    def shape(self, name: str, shard: Tensor) -> torch.Size:
        """Return the shape of a whole parameter, from this rank's shard of it."""
        return self._cut[name].shape if name in self._cut else shard.shape

    def shard(self, name: str, whole: Tensor) -> Tensor:
        """Return this rank's shard of a tensor that is cut as the parameter `name`."""
        if name not in self._cut or whole.shape != self._cut[name].shape:
            return whole
        # In memory of its own: a slice would keep the whole tensor.
        return shard_of(self._cut[name], whole).clone(memory_format=torch.contiguous_format)

    def _is_cut(self, name: str) -> bool:
        return name in self._cut and not all(p.is_replicate() for p in self._cut[name].placements)

    def _sum(self, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=self._group)
        return gradient
