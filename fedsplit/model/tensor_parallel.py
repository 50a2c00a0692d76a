"""Tensor parallelism: a trunk whose matrices are cut over the ranks of torch.distributed.

transformers cuts them by the family's own plan: each rank holds some heads of attention and some
rows of each matrix, as a DTensor, and computes with them alone. Everything above the module
(gradients, optimizer, norms) uses the plain tensor of this rank, its shard.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import PretrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.sharding_utils import DtensorShardOperation
from transformers.initialization import no_init_weights
from transformers.utils import logging

from fedsplit.errors import ConfigError, UnsupportedModel
from fedsplit.model.dryrun import FAMILY_ERRORS
from fedsplit.model.quantization import OPTION, quantization_of
from fedsplit.model.source import on_meta
from fedsplit.randomness import rng_scope

SUMMED = "replicated_with_grad_allreduce"
"""The style of parameters whose gradient on a rank is only that of the rank's heads."""

_ADAPTED = (None, "colwise", "rowwise", "colwise_gather_output", "colwise_rep", "replicate")
"""The styles of modules that can have adapters."""

_OTHERWISE = (
    "use launch.trunk_device=a,b, which puts whole blocks on each device and works with every model"
)


def sharding(ranks: int) -> dict[str, Any]:
    """The option for a part's builder that cuts the part over the ranks of torch.distributed.

    Empty for one rank. For more, all ranks of the process group build the part.
    """
    return {"distributed_config": DistributedConfig(tp_size=ranks)} if ranks > 1 else {}


def is_cut_by(options: Mapping[str, Any]) -> bool:
    """Whether a builder's options cut the part over several ranks."""
    return "distributed_config" in options


def num_ranks(model: nn.Module) -> int:
    """The number of ranks that a model's parameters are cut over; 1 for a model in one process."""
    return getattr(model, "_tp_size", None) or 1


def styles_of(part: PreTrainedModel) -> dict[str, str]:
    """The styles of the family's plan, by the names of the part's own parameters and modules."""
    # The number of ranks has no effect on the plan, except that one rank has none.
    styles, _, _ = part._resolve_parallel_plans(DistributedConfig(tp_size=2))
    found: dict[str, str] = styles
    return found


def require_shardable(
    cls: type[PreTrainedModel], config: PretrainedConfig, options: Mapping[str, Any]
) -> None:
    """Refuse a model that ranks cannot share, before its weights are read; all ranks call this.

    Args:
        cls: The class of the part.
        config: The unsplit model's config.
        options: Those of the part's builder.

    Raises:
        UnsupportedModel: Its weights are quantized, it has no plan, the plan cuts nothing, or its
            shards cannot run.
    """
    if OPTION in options or quantization_of(config):
        raise UnsupportedModel(
            f"{cls.__name__} cannot be cut over several ranks: its weights are quantized; "
            f"{_OTHERWISE}"
        )
    require_plan(on_meta(cls, copy.deepcopy(config)))
    with rng_scope(0), no_init_weights(), warnings.catch_warnings(), _silent():
        # The values do not matter here.
        warnings.filterwarnings("ignore", message="DTensor random operators")
        part = cls.from_pretrained(None, config=copy.deepcopy(config), state_dict={}, **options)
    require_runs(part)


@contextmanager
def _silent() -> Iterator[None]:
    """A context in which transformers does not report weights that have no values yet."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def require_plan(part: PreTrainedModel) -> None:
    """Refuse a model of which a plan cuts nothing.

    Args:
        part: The part on the meta device.

    Raises:
        UnsupportedModel: transformers has no plan for the family, or one that cuts nothing here.
    """
    family = type(part).__name__
    if not part.tp_plan:
        raise UnsupportedModel(
            f"{family} cannot be cut over several ranks: transformers has no tensor parallel plan "
            f"for it; {_OTHERWISE}"
        )
    names = {name for name, _ in part.named_parameters()}
    if not any(name in names and style != SUMMED for name, style in styles_of(part).items()):
        raise UnsupportedModel(
            f"{family} cannot be cut over several ranks: the tensor parallel plan of transformers "
            f"cuts none of its weights; {_OTHERWISE}"
        )


@contextmanager
def sized_as_whole(part: PreTrainedModel, names: Iterable[str]) -> Iterator[None]:
    """A context in which the weights of linear layers have the shapes of the whole, and no values.

    peft makes adapters of a rank's size for a cut weight. Those of the whole size have the initial
    values of a model in one process, and are cut after that.
    """
    modules = [part.get_submodule(name) for name in names] if num_ranks(part) > 1 else []
    weights = [module._parameters["weight"] for module in modules]
    for module, weight in zip(modules, weights, strict=True):
        assert weight is not None, "a linear layer has a weight"
        like = local_of(weight).new_zeros(())
        module._parameters["weight"] = nn.Parameter(like.expand(weight.shape), requires_grad=False)
    try:
        yield
    finally:
        for module, weight in zip(modules, weights, strict=True):
            module._parameters["weight"] = weight


def require_adaptable(part: PreTrainedModel, names: Iterable[str]) -> None:
    """Refuse adapters on modules or parameters whose adapters peft cannot cut.

    Args:
        part: The part; of one in one process nothing is refused.
        names: The names of what gets adapters.

    Raises:
        ConfigError: It is cut in a way for which peft has none.
    """
    if num_ranks(part) == 1:
        return
    styles = styles_of(part)
    for name in names:
        if (style := styles.get(name)) not in _ADAPTED:
            raise ConfigError(
                f"lora.targets: '{name}' is cut over ranks as {style}, and peft cuts adapters of "
                "colwise and rowwise layers only; name other targets, or use launch.trunk_tp=1"
            )


def require_runs(part: Any) -> None:
    """Refuse a part that fails when several ranks run it; all ranks call this.

    Args:
        part: The trunk on all ranks, with any values; they are overwritten.

    Raises:
        UnsupportedModel: Its forward, backward or decoding fails.
    """
    hidden_BTD = torch.zeros(1, 4, part.config.hidden_size, dtype=part.dtype, device=part.device)
    try:
        with torch.no_grad():
            for parameter in part.parameters():
                local_of(parameter).zero_()
            cache = part.new_cache()
            part.run(hidden_BTD, cache=cache)
            part.run(hidden_BTD[:, :1], cache=cache)
        out_BTD = part.run(hidden_BTD.requires_grad_())
        trained = [p for p in part.parameters() if p.requires_grad]
        torch.autograd.grad(out_BTD.sum(), [*trained, hidden_BTD], allow_unused=True)
    except FAMILY_ERRORS as exc:
        cause = " ".join(f"{type(exc).__name__}: {exc}".split())[:200]
        raise UnsupportedModel(
            f"{type(part).__name__} cannot be cut over {num_ranks(part)} ranks: it fails with "
            f"sharded weights ({_uneven_heads(part) or cause}); {_OTHERWISE}"
        ) from exc


def require_even(part: nn.Module) -> None:
    """Refuse a part with dropout of which ranks have shards of different sizes.

    Ranks have the same seeds. If one draws more numbers than another, what both of them have gets
    other dropout at each, and they train apart.

    Raises:
        ConfigError: A weight is not cut into equal shards.
    """
    for name, weight in part.named_parameters():
        for placement in weight.placements if isinstance(weight, DTensor) else ():
            if isinstance(placement, Shard) and weight.shape[placement.dim] % num_ranks(part):
                raise ConfigError(
                    f"{name} of size {weight.shape[placement.dim]} cannot be cut into "
                    f"{num_ranks(part)} equal shards, and with dropout the ranks would draw "
                    "different numbers; set the dropout to 0, or use another launch.trunk_tp"
                )


def _uneven_heads(part: PreTrainedModel) -> str:
    """Return which heads of attention the ranks cannot share evenly; empty if they can."""
    ranks, config = num_ranks(part), part.config.get_text_config(decoder=True)
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % ranks:
            return f"{name}={heads} is no multiple of {ranks}"
    return ""


def local_of(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, which shares its memory; a plain tensor is its own shard."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()


def shard_of(like: Tensor, whole: Tensor) -> Tensor:
    """This rank's shard of a whole tensor that is cut as `like`, which may be plain."""
    if not isinstance(like, DTensor):
        return whole
    shard = DtensorShardOperation(like).shard_tensor(whole)
    assert shard is not None, "each rank has a shard of each parameter"
    return shard


def local_gradient(parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
    """The gradient of a parameter's shard, from what autograd returned for the parameter."""
    if not isinstance(gradient, DTensor):
        return gradient
    assert isinstance(parameter, DTensor), "autograd returns a DTensor for a DTensor alone"
    if gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    return gradient.to_local()


def bytes_of_rank(model: nn.Module) -> int:
    """Return the bytes of this rank's shards of all parameters of a model."""
    shards: Iterable[Tensor] = (local_of(parameter) for parameter in model.parameters())
    return sum(shard.nbytes for shard in shards)
