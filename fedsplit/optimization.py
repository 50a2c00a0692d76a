"""The optimizer of one part, in the same arithmetic at every part and in the unsplit model.

Clipping uses the global norm over all three parts, so it needs the squared norms of both sides.
Each tensor's norm is torch's. The squares are summed exactly, so their order does not matter.
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
    """Return the sum of squares of all entries of all tensors; 0.0 if there is no tensor."""
    norms = [torch.linalg.vector_norm(tensor.detach()) for tensor in tensors]
    if not norms:
        return 0.0
    # One transfer for all norms: `.item()` on each would wait for the GPU once per tensor.
    # The tensors may be on several devices, and `stack` takes those of one device.
    stacked = torch.stack([norm.to(norms[0].device, torch.float64) for norm in norms])
    # `fsum` is exact, so the sum does not depend on the order of the tensors.
    return math.fsum(norm**2 for norm in stacked.cpu().tolist())


def unscale(gradients: Iterable[Tensor], loss_scale: float) -> None:
    """Divide gradients by the factor of their loss, in place; exact for powers of two."""
    if loss_scale != 1.0:
        for gradient in gradients:
            gradient.mul_(1.0 / loss_scale)


def block_norms(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the norm of each block's gradients; a block is a name up to its first number.

    >>> block_norms({"h.0.a": torch.tensor([3.0]), "h.0.b": torch.tensor([4.0])})
    {'h.0': 5.0}
    """
    blocks: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        blocks.setdefault(_block_of(name), []).append(gradient)
    return {block: squared_norm(tensors) ** 0.5 for block, tensors in blocks.items()}


def _block_of(name: str) -> str:
    levels = name.split(".")
    numbered = [i for i, level in enumerate(levels) if level.isdigit()]
    return ".".join(levels[: numbered[0] + 1]) if numbered else name


def clip_coefficient(sq_norm: float, clip_norm: float) -> float:
    """Return the factor for gradients of squared norm `sq_norm`, as `clip_grad_norm_` of torch.

    A `clip_norm` of 0 means that gradients are not clipped.

    >>> clip_coefficient(4.0, 0.0), clip_coefficient(0.25, 1.0)
    (1.0, 1.0)
    """
    if clip_norm == 0.0:
        return 1.0
    # torch adds the same 1e-6, so a clipped step equals that of the unsplit model.
    return min(1.0, clip_norm / (math.sqrt(sq_norm) + 1e-6))


class PartOptimizer:
    """A torch optimizer over the trained parameters of one part, by name.

    Weight decay applies to matrices, including embeddings, and not to vectors (biases, norms). In
    GPT-2, Llama and most families, the Hugging Face `Trainer` decays the same parameters. It
    selects them by name, so it also decays vectors that are neither bias nor norm (state-space and
    attention-sink scalars), and does not decay matrices whose name is a bias (experts of gpt-oss).
    Steps are torch's fused ones, as in the `Trainer`: one pass over memory, five times as fast.
    Steps with 8-bit moments are those of bitsandbytes, also as in the `Trainer`.

    Args:
        parameters: The parameters to train, by name.
        train: The optimizer, its constants and the schedule of the learning rate.

    Raises:
        ConfigError: bitsandbytes is needed, and is not installed or cannot use this device.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], train: TrainSpec) -> None:
        self.parameters = dict(parameters)
        self._train = train
        self._torch = _torch_optimizer(list(self.parameters.values()), train)

    def sq_norm(self) -> float:
        """Return the squared norm of the present gradients."""
        return squared_norm(self.gradients())

    def gradients(self) -> list[Tensor]:
        """Return the present gradients; a parameter without one is left out."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def step(self, step: int, coefficient: float = 1.0, lr_scale: float = 1.0) -> None:
        """Scale the gradients, take an optimizer step with them, and drop them.

        Args:
            step: The position in the schedule of the learning rate, from 0.
            coefficient: The factor on the gradients, from clipping.
            lr_scale: The factor on the learning rate; it is below 1 for stale gradients, and after
                training diverged.
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
            # None, not zeros: a parameter without a gradient must not be stepped, or decayed.
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Return the moments, one tensor per `parameter name|moment`."""
        return {
            f"{name}|{key}": torch.as_tensor(value)
            for name, parameter in self.parameters.items()
            for key, value in self._torch.state.get(parameter, {}).items()
            if value is not None
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Replace the moments by those that `state` returned; an empty mapping holds none yet.

        Raises:
            CheckpointError: A moment belongs to no parameter of this part.
        """
        for key, value in state.items():
            name, _, moment = key.partition("|")
            if name not in self.parameters:
                raise CheckpointError(
                    f"optimizer state {key!r} belongs to no trained parameter here; resume with "
                    "the model, split and lora it was saved with"
                )
            parameter = self.parameters[name]
            if self._train.optimizer in EIGHT_BIT:
                _restore(self._torch, parameter, moment, value)
                continue
            # A checkpoint may change device and dtype. `step` stays float32 in every dtype.
            dtype = value.dtype if moment == "step" else parameter.dtype
            restored = value.to(parameter.device, dtype)
            # A copy, because steps change moments in place and the caller still holds `state`.
            self._torch.state[parameter][moment] = restored.clone()


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
    """Return an AdamW whose moments are scaled blocks of 8-bit numbers.

    Small tensors keep 32 bits.

    Dettmers, Lewis, Shleifer and Zettlemoyer 2022, "8-bit Optimizers via Block-wise Quantization",
    ICLR, arXiv 2110.02861.
    """
    name = f"train.optimizer={train.optimizer}"
    # Imported here, because the library is an extra that only these optimizers need.
    try:
        import bitsandbytes
    except ImportError as exc:
        raise ConfigError(
            f"{name} needs bitsandbytes, which is not installed here: pip install "
            "'fedsplit[optimizers]' at every client and at the trunk, or use train.optimizer=adamw"
        ) from exc
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    if unsupported := sorted(devices - bitsandbytes.supported_torch_devices):
        raise ConfigError(
            f"{name} cannot run on {unsupported[0]}, which bitsandbytes {bitsandbytes.__version__} "
            "does not support; use train.optimizer=adamw"
        )
    optimizers: Any = bitsandbytes.optim
    kind = optimizers.AdamW8bit
    if train.optimizer.startswith("paged"):
        if "cpu" in devices:
            log.warning("%s pages nothing on a CPU; it is adamw_8bit here", name)
        else:
            kind = optimizers.PagedAdamW8bit
    optimizer: torch.optim.Optimizer = kind(
        groups, lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps
    )
    return optimizer


def _restore(optimizer: Any, parameter: nn.Parameter, moment: str, value: Tensor) -> None:
    """Copy a moment into the tensor that bitsandbytes made for it, in its type and memory."""
    state = optimizer.state[parameter]
    # The library makes its tensors at the first step; a resumed optimizer has not taken one.
    if not state:
        number, group, index = next(
            (number, group, index)
            for number, group in enumerate(optimizer.param_groups)
            for index, each in enumerate(group["params"])
            if each is parameter
        )
        optimizer.init_state(group, parameter, number, index)
    if moment not in state or value.shape != torch.as_tensor(state[moment]).shape:
        raise CheckpointError(
            f"a moment {moment!r} of shape {tuple(value.shape)} is none of an 8-bit optimizer "
            "here; resume with the train.optimizer and bitsandbytes it was saved with"
        )
    if moment == "step":
        state[moment] = int(value)
    else:
        state[moment].copy_(value)
