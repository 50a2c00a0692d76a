"""The optimizer of one part, in the same arithmetic at every part and in the unsplit model.

Clipping is by the global norm over all three parts, so it takes the squared norms of both sides.
Each tensor's norm is torch's; their squares are summed exactly, so no order of summing shows.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.errors import CheckpointError, ConfigError
from fedsplit.spec import TrainSpec
from fedsplit.spec.train import EIGHT_BIT

log = logging.getLogger(__name__)


def squared_norm(tensors: Iterable[Tensor]) -> float:
    """Sum of squares of all entries of all tensors."""
    norms = [torch.linalg.vector_norm(tensor.detach()) for tensor in tensors]
    if not norms:
        return 0.0
    # One transfer for all norms: `.item()` on each would wait for the GPU once per tensor.
    together = torch.stack([norm.to(norms[0].device, torch.float64) for norm in norms])
    return math.fsum(norm**2 for norm in together.tolist())


def unscale(gradients: Iterable[Tensor], loss_scale: float) -> None:
    """Make gradients of a scaled loss those of the loss; exact for powers of two."""
    if loss_scale != 1.0:
        for gradient in gradients:
            gradient.mul_(1.0 / loss_scale)


def block_norms(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm of each block's gradients; a block is a parameter's name up to the first number.

    >>> block_norms({"h.0.a": torch.tensor([3.0]), "h.0.b": torch.tensor([4.0])})
    {'h.0': 5.0}
    """
    blocks: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        blocks.setdefault(_block_of(name), []).append(gradient)
    return {block: squared_norm(tensors) ** 0.5 for block, tensors in blocks.items()}


def _block_of(name: str) -> str:
    pieces = name.split(".")
    ends = [i for i, piece in enumerate(pieces) if piece.isdigit()]
    return ".".join(pieces[: ends[0] + 1]) if ends else name


def clip_coefficient(sq_norm: float, clip_norm: float) -> float:
    """What to scale gradients of squared norm `sq_norm` by; as `torch.nn.utils.clip_grad_norm_`.

    >>> clip_coefficient(4.0, 0.0), clip_coefficient(0.25, 1.0)
    (1.0, 1.0)
    """
    if clip_norm == 0.0:
        return 1.0
    return min(1.0, clip_norm / (math.sqrt(sq_norm) + 1e-6))


class PartOptimizer:
    """A torch optimizer over the trained parameters of one part, by name.

    Weight decay is for matrices, embeddings among them, and not for vectors (biases, norms). Of
    GPT-2, Llama and most families these are the parameters that the Hugging Face `Trainer` decays;
    it goes by names, so it also decays vectors that are neither bias nor norm (state-space and
    attention-sink scalars) and leaves out matrices that are named a bias (experts of gpt-oss).
    Steps are torch's fused ones, as the `Trainer`'s are: one pass over memory, five times as fast.
    Those with 8-bit moments are of bitsandbytes, again as the `Trainer`'s.

    Raises:
        ConfigError: bitsandbytes is needed, and is not installed or cannot use this device.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], train: TrainSpec) -> None:
        self.parameters = dict(parameters)
        self._train = train
        self._torch = _torch_optimizer(list(self.parameters.values()), train)

    def sq_norm(self) -> float:
        """Squared norm of the gradients that are there now."""
        return squared_norm(self.gradients())

    def gradients(self) -> list[Tensor]:
        """The gradients that are there now."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def step(self, step: int, coefficient: float = 1.0, lr_scale: float = 1.0) -> None:
        """Scale the gradients, take optimizer step number `step` (from 0) and drop them.

        Args:
            step: Where the schedule of the learning rate stands.
            coefficient: Of the gradients, as clipping wants it.
            lr_scale: Of the learning rate, below 1 for gradients that are stale.
        """
        if coefficient != 1.0:
            for gradient in self.gradients():
                gradient.mul_(coefficient)
        for group in self._torch.param_groups:
            group["lr"] = self._train.lr_at(step) * lr_scale
        self._torch.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """The moments, one tensor per `parameter name|moment`."""
        return {
            f"{name}|{key}": torch.as_tensor(value)
            for name, parameter in self.parameters.items()
            for key, value in self._torch.state.get(parameter, {}).items()
            if value is not None
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over moments that `state` handed out; an empty mapping means none yet.

        Raises:
            CheckpointError: A moment belongs to no parameter of this part.
        """
        for key, value in state.items():
            name, _, moment = key.partition("|")
            if name not in self.parameters:
                raise CheckpointError(
                    f"optimizer state {key!r} belongs to no trained parameter here"
                )
            parameter = self.parameters[name]
            if self._train.optimizer in EIGHT_BIT:
                _restore(self._torch, parameter, moment, value)
                continue
            # On its way it may have left the parameter's device and dtype; steps are float32.
            dtype = value.dtype if moment == "step" else parameter.dtype
            kept = value.to(parameter.device, dtype)
            self._torch.state[parameter][moment] = kept.clone()


def _torch_optimizer(parameters: list[nn.Parameter], train: TrainSpec) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if train.optimizer in EIGHT_BIT:
        return _eight_bit(groups, train)
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, fused=True)
    decoupled = train.optimizer == "adamw"
    kind: type[torch.optim.Adam] = torch.optim.AdamW if decoupled else torch.optim.Adam
    betas = (train.beta1, train.beta2)
    return kind(groups, lr=train.lr, betas=betas, eps=train.eps, fused=True)


# --- moments in 8 bits --------------------------------------------------------------------------


def _eight_bit(groups: list[dict[str, Any]], train: TrainSpec) -> torch.optim.Optimizer:
    """AdamW whose moments are blocks of 8-bit numbers with a scale; small tensors keep 32 bits.

    Dettmers, Lewis, Shleifer and Zettlemoyer 2022, "8-bit Optimizers via Block-wise Quantization",
    ICLR, arXiv 2110.02861.
    """
    name = f"train.optimizer={train.optimizer}"
    try:
        import bitsandbytes
    except ImportError as exc:
        raise ConfigError(
            f"{name} needs bitsandbytes, which is not installed here: pip install "
            "'fedsplit[optimizers]' at every client and at the trunk, or use train.optimizer=adamw"
        ) from exc
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    if strange := sorted(devices - bitsandbytes.supported_torch_devices):
        raise ConfigError(
            f"{name} cannot run on {strange[0]}, which bitsandbytes {bitsandbytes.__version__} "
            "does not support; use train.optimizer=adamw"
        )
    optimizers: Any = bitsandbytes.optim
    kind = optimizers.AdamW8bit
    if train.optimizer.startswith("paged"):
        if "cpu" in devices:
            log.warning("%s pages nothing on a CPU; it is adamw_8bit here", name)
        else:
            kind = optimizers.PagedAdamW8bit
    made: torch.optim.Optimizer = kind(
        groups, lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps
    )
    return made


def _restore(optimizer: Any, parameter: nn.Parameter, moment: str, value: Tensor) -> None:
    """Put a moment where bitsandbytes itself would have it, in the type and memory it chose."""
    kept = optimizer.state[parameter]
    if not kept:
        place, group, index = next(
            (place, group, index)
            for place, group in enumerate(optimizer.param_groups)
            for index, each in enumerate(group["params"])
            if each is parameter
        )
        optimizer.init_state(group, parameter, place, index)
    if moment not in kept or value.shape != torch.as_tensor(kept[moment]).shape:
        raise CheckpointError(
            f"a moment {moment!r} of shape {tuple(value.shape)} is none of an 8-bit optimizer "
            "here; resume with the train.optimizer and bitsandbytes it was saved with"
        )
    if moment == "step":
        kept[moment] = int(value)
    else:
        kept[moment].copy_(value)
